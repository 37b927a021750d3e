"""Preparing teachers: fine-tuned each on its own sample, or used as they are; cached by content and reused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine import __version__
from engine.config import Config
from engine.data.encoded import EncodedSplits
from engine.data.splits import Task
from engine.errors import UserError
from engine.losses.domain_head import DomainHead, widen
from engine.losses.objectives import Objective
from engine.methods import METHODS, Method, State, meta_teacher
from engine.models.features import InnerStates, attach
from engine.models.learner import Learner
from engine.models.load import ModelSource, content_hash
from engine.models.network import Encoder
from engine.run import checkpoint
from engine.run.evaluation import predict, primary, score
from engine.run.prototypes import kept_states, prototypes, typicality
from engine.run.trainer import Phase, Plan, Progress, Trainer

META = ("domain_loss", "domain_weight", "prototype_own", "prototype_others")  # settings of a meta-teacher


@dataclass
class Member:
    """A model of the run: where it came from, its network, its tokenizer."""

    source: ModelSource
    network: Encoder
    tokenizer: object
    trained_head: bool


@dataclass
class Teacher:
    """A member ready to teach."""

    member: Member
    origin: str  # "fine-tuned", "reused" from the cache, or "as given"
    progress: Progress  # of its fine-tuning, `best` its validation metrics


def make_ready(config: Config, member: Member, task: Task) -> None:
    """Give a teacher the heads that --prepare-method trains; raises UserError where it has a trained one already."""
    how = config.method.prepare_method
    if how == "finetune" or config.method.method == "finetune":
        return
    if member.trained_head:
        raise UserError(f"--prepare-method {how} trains teachers in its own way, and {member.source.name} has a trained head; "
                        "give --retrain-teachers, or --prepare-method finetune.")  # fmt: skip
    if how == "multitask":
        widen(member.network.module, task.num_labels, list(task.domains), config.run.teacher_seed)
        member.network.heads = len(task.domains)


def prepare(
    config: Config, member: Member, splits: EncodedSplits, objective: Objective, trainer: Trainer, cache: Path
) -> Teacher:
    """Train `member` in place on its sample of `splits`, or restore what the same job left in `cache`; a trained head is kept.

    How is --prepare-method's; a meta-teacher keeps its domain head as an extra of its module.
    """
    source, network, method = member.source, member.network, config.method
    train, validation, step = splits.train[source.sample], splits.validation, METHODS["finetune"]
    if member.trained_head:
        network.module.to(trainer.device)
        metrics = score(predict(network, validation, trainer.device), validation.labels, trainer.task)
        trainer.console.say(
            f"Teacher {source.name}: its trained head is used as it is (--retrain-teachers changes that)."
        )
        return Teacher(member, "as given", Progress(best=metrics))
    optim, seed = config.optim, config.run.teacher_seed
    if method.prepare_method == "meta":
        network.module.to(trainer.device)
        train = train.with_columns(
            {"typicality": typicality_of(config, network, splits, source.sample, trainer, cache)}
        )
        head = DomainHead(network.module.config.hidden_size, len(trainer.task.domains),
                          method.domain_loss == "reversal", seed, len(train.columns["domain"].unique()))  # fmt: skip
        attach(network.module, "domain", head.to(trainer.device))
        step = Method(meta_teacher.step(method.domain_weight, method.domain_loss == "shuffled"), "none")
    plan = Plan(-(-len(train) // optim.batch_size), optim.prepare_epochs)
    settings = {
        "engine": __version__, "torch": torch.__version__, "device": trainer.device.type, "seed": seed,
        "precision": config.run.precision, "max_length": config.data.max_length, "steps": plan.steps,
        "length_buckets": config.data.length_buckets,
        "eval_steps": config.run.eval_steps, "encoding": network.encoding, "name": source.name,
        "data": [splits.hashes[source.sample], splits.hashes[-2]],
        "threads": torch.get_num_threads() if trainer.device.type == "cpu" else 0,  # sums depend on it
        "model": content_hash(network.module), "optim": {
            name: getattr(optim, name)
            for name in ("prepare_lr", "batch_size", "warmup_ratio", "weight_decay", "max_grad_norm")},
    }  # fmt: skip
    if primary(trainer.task) not in ("accuracy", "pearson"):  # which chose the weights that are kept
        settings["metric"] = primary(trainer.task)
    if optim.optimizer != "flat":  # other roundings
        settings["optimizer"] = optim.optimizer
    if config.run.compile:  # likewise
        settings["compile"] = True
    if optim.micro_batch_size is not None:  # sums in another order, other dropout masks
        settings["micro_batch_size"] = optim.micro_batch_size
    if method.prepare_method != "finetune":
        settings["method"] = {name: getattr(method, name) for name in ("prepare_method", *META)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    file = cache / "teachers" / f"{key}.safetensors"
    phase_name = f"prepare {source.name}"
    if (progress := _reuse(file, network)) is not None:
        trainer.skip(phase_name)
        trainer.console.say(f"Teacher {source.name}: reused, prepared before with the same data and settings ({file}).")
        network.module.to(trainer.device)
        return Teacher(member, "reused", progress)
    network.module.to(trainer.device)  # before its weights are flattened
    learner = Learner.adamw(
        network, lr=optim.prepare_lr, steps=plan.steps, warmup_ratio=optim.warmup_ratio,
        weight_decay=optim.weight_decay, max_grad_norm=optim.max_grad_norm, optimizer=optim.optimizer,
    )  # fmt: skip
    state = State(learner, objective, micro_batch=optim.micro_batch_size)
    phase = Phase(phase_name, step, state, train, validation, plan, optim.batch_size, seed)
    giving = InnerStates(domain="logits") if method.prepare_method == "meta" else InnerStates()
    with network.giving(giving):
        progress = trainer.fit(phase)
    network.flat.release_gradients()  # it may be frozen from here on
    checkpoint.save(file, checkpoint.module_tensors(network.module), {"progress": asdict(progress)})
    return Teacher(member, "fine-tuned", progress)


def typicality_of(
    config: Config, network: Encoder, splits: EncodedSplits, sample: int, trainer: Trainer, cache: Path,
    reference: EncodedSplits | None = None,
) -> Tensor:  # fmt: skip
    """How typical each example of a training sample is [n], by the prototypes of the same sample of `reference` (default:
    `splits`), in the encoder as it is now."""
    method, count = config.method, len(trainer.task.domains)
    others = method.prototype_others
    if others is None:
        others = (1 - method.prototype_own) / (count - 1)

    def known(splits: EncodedSplits) -> tuple[Tensor, Tensor, Tensor]:
        train = splits.train[sample]
        states = kept_states(network, train, splits.hashes[sample], trainer.device, cache / "states")
        return states, train.columns["domain"], train.labels

    p = prototypes(*known(reference or splits), count, trainer.task.num_labels)
    return typicality(*known(splits), p, method.prototype_own, others)


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
