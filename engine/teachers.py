"""Preparing teachers: fine-tuned each on its own sample, or used as they are; cached by content and reused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine import __version__, checkpoint
from engine.config import Config
from engine.data.encode import EncodedSplits
from engine.errors import UserError
from engine.evaluation import predict, primary, score
from engine.learner import Learner
from engine.methods import METHODS, State
from engine.models import ModelSource, content_hash
from engine.network import Network
from engine.objectives import Objective
from engine.trainer import Phase, Plan, Progress, Trainer


@dataclass
class Member:
    """A model of the run: where it came from, its network, its tokenizer."""

    source: ModelSource
    network: Network
    tokenizer: object
    trained_head: bool


@dataclass
class Teacher:
    """A member ready to teach."""

    member: Member
    origin: str  # "fine-tuned", "reused" from the cache, or "as given"
    progress: Progress  # of its fine-tuning, `best` its validation metrics


def prepare(
    config: Config, member: Member, splits: EncodedSplits, objective: Objective, trainer: Trainer, cache: Path
) -> Teacher:
    """Fine-tune `member` in place on its sample, or restore what the same job left in `cache`; a trained head is kept."""
    source, network, train, validation = (
        member.source,
        member.network,
        splits.train[member.source.sample],
        splits.validation,
    )
    if member.trained_head:
        network.module.to(trainer.device)
        metrics = score(predict(network, validation, trainer.device), validation.labels, trainer.task)
        trainer.console.say(
            f"Teacher {source.name}: its trained head is used as it is (--retrain-teachers changes that)."
        )
        return Teacher(member, "as given", Progress(best=metrics))
    optim, seed = config.optim, config.run.teacher_seed
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
    phase = Phase(phase_name, METHODS["finetune"], state, train, validation, plan, optim.batch_size, seed)
    progress = trainer.fit(phase)
    network.flat.release_gradients()  # it may be frozen from here on
    checkpoint.save(file, checkpoint.module_tensors(network.module), {"progress": asdict(progress)})
    return Teacher(member, "fine-tuned", progress)


def _reuse(file: Path, network: Network) -> Progress | None:
    if not file.exists():
        return None
    try:
        tensors, state = checkpoint.load(file)
    except UserError:
        file.unlink()  # a damaged cache entry costs its preparation again, nothing else
        return None
    checkpoint.restore_module(network.module, tensors)
    return Progress(**state["progress"])
