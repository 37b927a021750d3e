"""Settings once models and data are known: which are refused, their defaults, and the choices that depend on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

from engine.config import Config, MethodConfig
from engine.data.noise import Reader
from engine.data.splits import Task
from engine.errors import UserError
from engine.losses.divergences import DIVERGENCES, FOR_REGRESSION
from engine.losses.layer_map import LayerMap, layer_map
from engine.losses.objectives import Objective
from engine.methods import METHODS
from engine.models import cuda_graph, precision
from engine.models.checkpointing import REFUSED
from engine.models.encoder_layers import encoder_layers
from engine.models.load import ModelSource
from engine.models.network import Network
from engine.params import optim

# The papers' settings. For the teachers' meta-updates MetaDistil's 1e-5, not the 6e-5 of its extension: AdamW takes the
# scale out of the meta-gradient, and at 6e-5 a teacher loses its task while the student is new (docs/log.md).
PAPER = {"lr": 6e-5, "teacher_lr": 1e-5, "prepare_lr": 6e-5, "epochs": 3, "prepare_epochs": 3}


def settle_device(config: Config, say: Callable[[str], None]) -> torch.device:
    """The device of a run. Sets the precision, and writes it into `config`.

    Raises UserError for a device that does not exist, and for settings that do not go with it or with the method.
    """
    refuse(config)
    device = _device(config.run.device)
    config.run.precision, instead = precision.choose(config.run.precision, device)
    if instead is not None:
        say(instead)
    precision.apply(config.run.precision)
    optim.check(config.optim.optimizer, device)
    cuda_graph.require(config.run.cuda_graphs, device)
    return device


def refuse(config: Config) -> None:
    """Raises UserError for settings that do not go together, whatever the device is."""
    _refuse_answers(config)
    _refuse_noise(config)
    _refuse_compile(config)
    _refuse_without_quiz(config)


def _refuse_answers(config: Config) -> None:
    """Raises UserError where --cache-teacher-logits has nothing to keep."""
    method = config.method
    if not method.cache_teacher_logits:
        return
    teachers = METHODS[method.method].teachers
    if teachers != "frozen":
        why = "whose teachers change in every round" if teachers == "learning" else "which has no teachers"
        raise UserError(f"--cache-teacher-logits keeps the answers of frozen teachers, and does not fit --method {method.method}, "
                        f"{why}; use --method kd, or leave it out.")  # fmt: skip
    chosen = _by_method(config)
    if chosen["feature_loss"] == "tinybert" and chosen["feature_epochs"] == 0:
        raise UserError("--cache-teacher-logits cannot keep the states of every token, which --feature-loss tinybert compares; "
                        "leave it out, or give --feature-epochs, after which only logits are compared.")  # fmt: skip


def _refuse_noise(config: Config) -> None:
    """Raises UserError for noise that no teacher would read."""
    method = config.method
    if method.noise_teacher and METHODS[method.method].teachers == "none":
        raise UserError(f"--noise-teacher is {method.noise_teacher}, but --method {method.method} has no teachers; use "
                        "--noise-student, or leave it out.")  # fmt: skip
    if method.noise_teacher and method.cache_teacher_logits:
        raise UserError("--noise-teacher changes the teachers' batches in every epoch, and --cache-teacher-logits computes their "
                        "answers only once; leave one of the two out.")  # fmt: skip


def _refuse_compile(config: Config) -> None:
    """Raises UserError where --compile and --checkpointing want the same layers."""
    choice = config.method.checkpointing
    if config.run.compile and choice != "none" and METHODS[config.method.method].teachers == "learning":
        raise UserError(f"--compile does not go with --checkpointing {choice}, which computes layers in its own way to have their "
                        "second derivatives; leave one of the two out.")  # fmt: skip


def _refuse_without_quiz(config: Config) -> None:
    """Raises UserError for settings of a meta-gradient if the method has none."""
    method = config.method
    if METHODS[method.method].learn_from != "weights":
        return
    usual = MethodConfig()
    allowed = {
        "meta_grad": (method.meta_grad == usual.meta_grad, "takes no meta-gradient"),
        "pilot_optimizer": (
            method.pilot_optimizer == usual.pilot_optimizer,
            "always takes its pilot step by a new AdamW",
        ),
        "pilot_steps": (method.pilot_steps == usual.pilot_steps, "takes one pilot step in a round"),
        "quiz_batches": (method.quiz_batches == usual.quiz_batches, "draws no quiz batches"),
        "checkpointing": (method.checkpointing in ("none", "student"), "has no backward pass through teachers"),
        "teacher_params": (not method.teacher_params.startswith("lora"), "moves weights that the student has too"),
    }
    for name, (fits, why) in allowed.items():
        if not fits:
            raise UserError(f"--{name.replace('_', '-')} {getattr(method, name)} does not fit --method {method.method}, which "
                            f"{why}; leave it out, or use --method metadistil.")  # fmt: skip


def _device(given: str) -> torch.device:
    """The device of --device; raises UserError if it does not exist."""
    if given == "auto":
        given = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError as e:
        raise UserError(f"--device is {given!r}; it must be auto, cpu, cuda or cuda:N.") from e
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {given!r}; it must be auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device is {given}, but torch finds no CUDA device; use --device cpu or auto.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device is {given}, but there are only {torch.cuda.device_count()} CUDA devices.")
        torch.cuda.set_device(device)  # pinned memory and generators would open a context on device 0 otherwise
    return device


def resolve_defaults(config: Config, student: ModelSource, teachers: Sequence[ModelSource]) -> None:
    """Replace None by the method's own default, or by what suits the models: the papers' settings, or the embedded miniatures'.

    Raises UserError for a default in the method's file that names no such setting, or is out of its range.
    """
    by_student, by_teachers = _defaults_for([student]), _defaults_for(teachers)
    chosen: dict[str, Any] = {"lr": by_student["lr"], "epochs": by_student["epochs"]}
    chosen |= {name: by_teachers[name] for name in ("teacher_lr", "prepare_lr", "prepare_epochs")}
    chosen |= _by_method(config)
    sections = {f.name: section for section in config.sections() for f in fields(section)}
    referring = sorted(chosen, key=lambda name: _referred(chosen[name]) is not None)  # last, to what is settled by then
    for name in referring:
        if getattr(sections[name], name) is None:
            other = _referred(chosen[name])
            setattr(sections[name], name, chosen[name] if other is None else getattr(sections[other], other))
    for section in config.sections():
        section.check()
    if config.run.teacher_seed is None:
        config.run.teacher_seed = config.run.seed


def _by_method(config: Config) -> dict[str, Any]:
    """The settings that depend on the method: as they were given, else the method's default, else the usual one."""
    method, given, usual = METHODS[config.method.method], config.to_flat(), Config().to_flat()
    chosen = {f.name: f.metadata["otherwise"] for f in fields(config.method) if f.metadata["otherwise"] is not None}
    for name, default in method.defaults.items():
        other = _referred(default) or name
        if usual.get(name, "") is not None or other not in given:
            raise UserError(f"--method {config.method.method} has the default {name}={default!r}, but {name} is no setting whose "
                            "default is None in engine/config.py, or there is no such other setting; correct the method's file.")  # fmt: skip
    chosen |= method.defaults
    chosen |= {name: given[name] for name in chosen if given[name] is not None}
    if chosen["feature_loss"] == "none" and given["feature_epochs"] is None:
        chosen["feature_epochs"] = 0
    if method.learn_from == "weights" and given["pilot_optimizer"] is None:
        del chosen["pilot_optimizer"]  # its pilot step is its own
    return {"beta": 1.0 if chosen["feature_loss"] == "tinybert" else 100.0} | chosen


def _referred(default: Any) -> str | None:
    """ "--epochs" -> "epochs", for a default that takes over another setting's value."""
    is_flag = isinstance(default, str) and default.startswith("--")
    return default[2:].replace("-", "_") if is_flag else None


def settle_source(config: Config, sources: Sequence[ModelSource], data: str) -> None:
    """Record the source of models and data, so that config.yaml and --resume keep to it when the hub can be reached again."""
    named = {data, *(source.kind for source in sources)} - {"local"}
    if len(named) == 1:
        config.models.source = named.pop()


def _defaults_for(sources: Sequence[ModelSource]) -> dict[str, float]:
    if not any(source.kind == "embedded" for source in sources):
        return PAPER
    from engine.embedded import DEFAULTS

    return DEFAULTS


def layer_numbers(given: str) -> list[int]:
    """The numbers of --student-layers; raises UserError for anything else."""
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as e:
        raise UserError(f"--student-layers is {given!r}; give layer numbers counted from 0, as in 1,3,5.") from e


def objective(config: Config, task: Task, say: Callable[[str], None]) -> Objective:
    """The losses of a run. Raises UserError for epochs on features without a feature loss."""
    method = config.method
    taught, regression = METHODS[method.method].teachers != "none", task.kind == "regression"
    if regression and not DIVERGENCES[method.soft_loss].regression:
        if taught:
            say(f"--soft-loss {method.soft_loss} does not compare the one output of a regression; {FOR_REGRESSION} is used "
                "instead.")  # fmt: skip
        method.soft_loss = FOR_REGRESSION
    features = method.feature_loss if taught else "none"
    if taught and method.feature_epochs and features == "none":
        raise UserError(
            f"--feature-epochs {method.feature_epochs} needs a feature loss to train on; choose one with --feature-loss."
        )
    return Objective(method.soft_loss, method.temperature, method.alpha, regression, features, method.beta)


def noise_readers(
    config: Config, student: Network, teachers: Sequence[Network], say: Callable[[str], None]
) -> dict[str, Reader]:
    """Who reads training batches with noise, by role; empty if both probabilities are 0. Each network is told its role."""
    settings, found = config.method, {}
    for role, networks, probability in (
        ("teacher", teachers, settings.noise_teacher),
        ("student", [student], settings.noise_student),
    ):
        if probability:
            found[role] = Reader(frozenset(network.encoding for network in networks), probability)
            for network in networks:
                network.role = role
    if found:
        shares = " and ".join(f"{100 * reader.probability:g} % of the {role}'s words" for role, reader in found.items())
        by = {"mask": "the mask token", "vocabulary": "random tokens"}[settings.noise_kind]
        say(f"Noise: {shares} are replaced by {by} in training batches.")
    return found


def check_checkpointing(choice: str, student: Network, teachers: Sequence[Network]) -> None:
    """Raises UserError for a choice without second derivatives, and for a model whose layers are not known."""
    if choice in REFUSED:
        raise UserError(f"--checkpointing {choice} is refused: {REFUSED[choice]}; use student, teachers or both.")
    networks = [student] if choice in ("student", "both") else []
    networks += teachers if choice in ("teachers", "both") else []
    for network in networks:
        try:
            encoder_layers(network.module)
        except ValueError as e:
            raise UserError(f"--checkpointing {choice} does not fit {network.name}: {e}") from e


def layer_maps(config: Config, student: Network, teachers: Sequence[Network]) -> list[LayerMap]:
    """The layer map (--layer-map) of each teacher's trainable weights; none if the method compares no weights.

    Raises UserError for two models that cannot be compared.
    """
    if METHODS[config.method.method].learn_from != "weights":
        return []
    return [
        layer_map(student.module, teacher.module, config.method.layer_map, (student.name, teacher.name),
                  same_tokens=teacher.encoding == student.encoding)
        for teacher in teachers
    ]  # fmt: skip


def teacher_weights(config: Config, teachers: int) -> list[float] | str | None:
    """The value of --teacher-weights; raises UserError if it does not fit the teachers or the method."""
    given, method = config.method.teacher_weights, config.method.method
    if given is None:
        return None
    if given == "learned":
        if METHODS[method].learn_from != "quiz":
            raise UserError(f"--teacher-weights learned needs the meta-gradient, which --method {method} does not have; use "
                            "--method metadistil, or leave it out.")  # fmt: skip
        return given
    if not teachers:
        raise UserError(f"--method {method} has no teachers; leave --teacher-weights out.")
    try:
        weights = [float(part) for part in str(given).split(",")]
    except ValueError:
        weights = []
    if len(weights) != teachers or not all(0 < w < float("inf") for w in weights):
        raise UserError(f"--teacher-weights is {given!r}; give {teachers} positive number{'s' * (teachers != 1)}, one a "
                        "teacher, as in 0.7,0.3, or learned.")  # fmt: skip
    return weights
