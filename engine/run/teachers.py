"""Preparing teachers: fine-tuned each on its own sample, or used as they are; cached by content and reused."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

from engine.config import Config
from engine.data import kept
from engine.data.encoded import EncodedSplit, EncodedSplits
from engine.errors import UserError
from engine.losses.domain_head import DomainHead
from engine.losses.objectives import Objective
from engine.methods import METHODS, Method, State
from engine.methods.common import meta_teacher
from engine.models.features import InnerStates, attach
from engine.models.load import content_hash
from engine.models.network import Encoder
from engine.run import checkpoint
from engine.run.evaluation import predict, primary, score
from engine.run.members import Member
from engine.run.phase import Phase, Plan, Progress
from engine.run.prototypes import kept_states, prototypes, typicality
from engine.run.setup import Setup
from engine.run.states import learner
from engine.run.trainer import Trainer

META = ("domain_loss", "domain_weight", "prototype_own", "prototype_others")  # settings of a meta-teacher


@dataclass
class Teacher:
    """A member ready to teach."""

    member: Member
    origin: str  # "fine-tuned", "reused" from the cache, or "as given"
    progress: Progress  # of its fine-tuning, `best` its validation metrics


def prepare(setup: Setup, member: Member, trainer: Trainer) -> Teacher:
    """Train `member` in place on its sample as --prepare-method says, or restore what an equal run left in the cache. A model
    with a trained head stays as it is. A meta-teacher keeps its domain head as an extra of its module."""
    source, network, data = member.source, member.network, setup.examples.of_teacher(member.source)
    if member.trained_head:
        return _as_given(setup, member, data)
    train, step = data.train[source.sample], METHODS["finetune"]
    meta = setup.config.method.prepare_method == "meta"
    if meta:
        train, step = _with_domains(setup, network, data, source.sample)
    plan = plan_of(setup.config, train)
    file = setup.cache / "teachers" / f"{_key(setup, member, data, plan)}.safetensors"
    progress = _reuse(file, network)
    network.move(setup.device)
    if progress is not None:
        trainer.resume.skip(phase_name(member))
        setup.console.say(f"Teacher {source.name}: reused, prepared before with the same data and settings ({file}).")
        return Teacher(member, "reused", progress)
    phase = fine_tuning(setup.config, member, setup.losses.objective, step, train, data.validation)
    with network.giving(InnerStates(domain="logits") if meta else InnerStates()):
        progress = trainer.fit(phase)
    network.flat.release_gradients()  # it may be frozen from here on
    checkpoint.save(file, checkpoint.module_tensors(network.module), {"progress": asdict(progress)})
    return Teacher(member, "fine-tuned", progress)


def phase_name(member: Member) -> str:
    return f"prepare {member.source.name}"


def plan_of(config: Config, train: EncodedSplit) -> Plan:
    return Plan(-(-len(train) // config.optim.batch_size), config.optim.prepare_epochs)


def fine_tuning(
    config: Config, member: Member, objective: Objective, step: Method, train: EncodedSplit, validation: EncodedSplit | None
) -> Phase:  # fmt: skip
    """The phase that prepares `member`, whose network stands on its device."""
    optim, plan = config.optim, plan_of(config, train)
    learning = learner(member.network, optim, optim.prepare_lr, plan.steps)
    state = State(learning, objective, micro_batch=optim.micro_batch_size)
    seed = config.run.teacher_seed
    return Phase(phase_name(member), step, state, train, validation, plan, optim.batch_size, seed)


def _as_given(setup: Setup, member: Member, data: EncodedSplits) -> Teacher:
    network, validation = member.network, data.validation
    network.move(setup.device)
    metrics = score(predict(network, validation, setup.device), validation.labels, setup.task)
    setup.console.say(
        f"Teacher {member.source.name}: its trained head is used as it is (--retrain-teachers changes that)."
    )
    return Teacher(member, "as given", Progress(best=metrics))


def _with_domains(setup: Setup, network: Encoder, data: EncodedSplits, sample: int) -> tuple[EncodedSplit, Method]:
    """What a meta-teacher is prepared with: examples that know how typical they are, a domain head, a step for both."""
    settings = setup.config.method
    network.move(setup.device)
    typical = typicality_of(setup, network, data, sample)
    train = data.train[sample].with_columns({"typicality": typical})
    head = DomainHead(network.module.config.hidden_size, len(setup.task.domains), settings.domain_loss == "reversal",
                      setup.config.run.teacher_seed, len(train.columns["domain"].unique()))  # fmt: skip
    attach(network.module, "domain", head.to(setup.device))
    step = meta_teacher.step(settings.domain_weight, settings.domain_loss == "shuffled")
    return train, replace(METHODS["finetune"], step=step)


def _key(setup: Setup, member: Member, data: EncodedSplits, plan: Plan) -> str:
    """Names all that the prepared weights depend on; what a setting had no part in stays out."""
    config, network, device, metric = setup.config, member.network, setup.device, primary(setup.task)
    optim, method = config.optim, config.method
    settings = {
        "torch": torch.__version__, "transformers": transformers.__version__, "device": device.type,
        "seed": config.run.teacher_seed,
        "precision": config.run.precision, "max_length": config.data.max_length, "steps": plan.steps,
        "length_buckets": config.data.length_buckets,
        "eval_steps": config.run.eval_steps, "encoding": network.encoding, "name": member.source.name,
        "data": [data.hashes[member.source.sample], data.hashes[-2]],
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,  # sums depend on it
        "model": content_hash(network.module), "optim": {
            name: getattr(optim, name)
            for name in ("prepare_lr", "batch_size", "warmup_ratio", "weight_decay", "max_grad_norm")},
    }  # fmt: skip
    if metric not in ("accuracy", "pearson"):  # which chose the weights that are kept
        settings["metric"] = metric
    if optim.optimizer != "flat":  # other roundings
        settings["optimizer"] = optim.optimizer
    if config.run.compile:  # likewise
        settings["compile"] = True
    if optim.micro_batch_size is not None:  # sums in another order, other dropout masks
        settings["micro_batch_size"] = optim.micro_batch_size
    if method.prepare_method != "finetune":
        settings["method"] = {name: getattr(method, name) for name in ("prepare_method", *META)}
    return kept.key(**settings)


def _reuse(file: Path, network: Encoder) -> Progress | None:
    if not file.exists():
        return None
    try:
        tensors, state = checkpoint.load(file)
    except UserError:
        file.unlink()  # a damaged cache entry costs its preparation again, nothing else
        return None
    checkpoint.restore_module(network.module, tensors)
    return Progress.of(state["progress"])


def typicality_of(
    setup: Setup, network: Encoder, data: EncodedSplits, sample: int, reference: EncodedSplits | None = None
) -> Tensor:
    """How typical each example of a training sample of `data` is [n], by the prototypes of the same sample of `reference`
    (default: `data`), in the encoder as it is now."""
    method, count = setup.config.method, len(setup.task.domains)
    others = method.prototype_others
    if others is None:
        others = (1 - method.prototype_own) / (count - 1)

    def known(data: EncodedSplits) -> tuple[Tensor, Tensor, Tensor]:
        train = data.train[sample]
        states = kept_states(network, train, data.hashes[sample], setup.device, setup.cache / "states")
        return states, train.columns["domain"], train.labels

    p = prototypes(*known(reference or data), count, setup.task.num_labels)
    return typicality(*known(data), p, method.prototype_own, others)
