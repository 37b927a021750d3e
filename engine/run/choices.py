"""What settings come to once models and data are known: refusals, defaults, and the choices that depend on several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.config import Config
from engine.data.noise import Reader
from engine.data.splits import Task
from engine.errors import UserError
from engine.losses.layer_map import LayerMap, layer_map
from engine.losses.objectives import Objective
from engine.methods import METHODS
from engine.models import cuda_graph, precision
from engine.models.checkpointing import REFUSED, encoder_layers
from engine.models.load import ModelSource
from engine.models.network import Network
from engine.params import optim

# The papers' settings. For the teachers' meta-updates MetaDistil's 1e-5, not the 6e-5 of its extension: AdamW takes the
# scale out of the meta-gradient, and at 6e-5 a teacher loses its task while the student is new (docs/log.md).
PAPER = {"lr": 6e-5, "teacher_lr": 1e-5, "prepare_lr": 6e-5, "epochs": 3, "prepare_epochs": 3}


DEFAULTS = {"temperature": 5.0, "alpha": 0.5, "feature_loss": "none", "prepare_method": "finetune"}
METHOD_DEFAULTS = {
    "lgtm": {"temperature": 1.0, "alpha": 1.0},
    "metakd": {"temperature": 2.0, "alpha": 1.0, "feature_loss": "tinybert", "prepare_method": "meta"},
}


def settle_device(config: Config, say: Callable[[str], None]) -> torch.device:
    """The device of a run, with its precision set and written into `config`.

    Raises UserError for a device that does not exist, and for what does not go with it or with the method.
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
    teachers = METHODS[method.method].teachers
    by_method = METHOD_DEFAULTS.get(method.method, {})
    together = method.feature_epochs == 0 or (method.feature_epochs is None and method.method != "metakd")
    tinybert = (method.feature_loss or by_method.get("feature_loss")) == "tinybert"
    if method.cache_teacher_logits and tinybert and together:
        raise UserError("--cache-teacher-logits cannot keep what --feature-loss tinybert compares, the states of every token; "
                        "leave it out, or give --feature-epochs, after which there are logits alone.")  # fmt: skip
    if method.cache_teacher_logits and teachers != "frozen":
        why = "whose teachers change in every round" if teachers == "learning" else "which has no teachers"
        raise UserError(
            f"--cache-teacher-logits keeps what frozen teachers answer, and does not fit --method {method.method}, {why}; use "
            "--method kd, or leave it out.")  # fmt: skip


def _refuse_noise(config: Config) -> None:
    """Raises UserError for noise in what no teacher reads."""
    method = config.method
    if method.noise_teacher and METHODS[method.method].teachers == "none":
        raise UserError(f"--noise-teacher is {method.noise_teacher}, but --method {method.method} has no teachers; use "
                        "--noise-student, or leave it out.")  # fmt: skip
    if method.noise_teacher and method.cache_teacher_logits:
        raise UserError("--noise-teacher changes what teachers read in every epoch, and --cache-teacher-logits asks them once; "
                        "leave one of the two out.")  # fmt: skip


def _refuse_compile(config: Config) -> None:
    """Raises UserError where --compile and --checkpointing want the same layers."""
    choice = config.method.checkpointing
    if config.run.compile and choice != "none" and METHODS[config.method.method].teachers == "learning":
        raise UserError(f"--compile does not go with --checkpointing {choice}, which runs layers in its own way so that they "
                        "have second derivatives; leave one of the two out.")  # fmt: skip


def _refuse_without_quiz(config: Config) -> None:
    """Raises UserError for settings of a meta-gradient where a method has none."""
    method = config.method
    if METHODS[method.method].learn_from != "weights":
        return
    allowed = {
        "meta_grad": (method.meta_grad == "exact", "takes no meta-gradient"),
        "pilot_optimizer": (method.pilot_optimizer is None, "has a pilot step of its own, a new AdamW's"),
        "pilot_steps": (method.pilot_steps == 1, "takes one step a batch"),
        "quiz_batches": (method.quiz_batches == 1, "draws no quiz batches"),
        "checkpointing": (method.checkpointing in ("none", "student"), "has no backward pass through teachers"),
        "teacher_params": (not method.teacher_params.startswith("lora"), "moves weights that the student has too"),
    }
    for name, (fits, why) in allowed.items():
        if not fits:
            raise UserError(f"--{name.replace('_', '-')} {getattr(method, name)} does not fit --method {method.method}, which "
                            f"{why}; leave it out, or use --method metadistil.")  # fmt: skip


def _device(given: str) -> torch.device:
    """The device of `--device`; raises UserError where it does not exist."""
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
    """Fill in what was left to the method and to the models: the papers' settings, or those that suit the embedded miniatures."""
    by_student = _defaults_for([student])
    by_teachers = _defaults_for(teachers)
    optim = config.optim
    for name, defaults in {"lr": by_student, "epochs": by_student, "teacher_lr": by_teachers,
                           "prepare_lr": by_teachers, "prepare_epochs": by_teachers}.items():  # fmt: skip
        if getattr(optim, name) is None:
            setattr(optim, name, defaults[name])
    method = config.method
    by_method = DEFAULTS | METHOD_DEFAULTS.get(method.method, {})
    feature_loss = method.feature_loss or by_method["feature_loss"]
    by_method["feature_epochs"] = optim.epochs if method.method == "metakd" and feature_loss != "none" else 0
    by_method["beta"] = 1.0 if feature_loss == "tinybert" else 100.0
    by_method["pilot_lr"] = optim.lr
    if METHODS[method.method].learn_from != "weights":  # whose pilot step is its own
        by_method["pilot_optimizer"] = "adamw" if METHODS[method.method].own_loss else "sgd"
    for name, default in by_method.items():
        if getattr(method, name) is None:
            setattr(method, name, default)
    if config.run.teacher_seed is None:
        config.run.teacher_seed = config.run.seed


def settle_source(config: Config, sources: Sequence[ModelSource], data: str) -> None:
    """Record where everything came from, so that config.yaml and --resume do not take the other when the hub is back."""
    named = {data, *(source.kind for source in sources)} - {"local"}
    if len(named) == 1:
        config.models.source = named.pop()


def _defaults_for(sources: Sequence[ModelSource]) -> dict[str, float]:
    if not any(source.kind == "embedded" for source in sources):
        return PAPER
    from engine.embedded import DEFAULTS

    return DEFAULTS


def layer_numbers(given: str) -> list[int]:
    """Of --student-layers; raises UserError for what is not a list of numbers."""
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as e:
        raise UserError(f"--student-layers is {given!r}; give layer numbers counted from 0, as in 1,3,5.") from e


def objective(config: Config, task: Task, say: Callable[[str], None]) -> Objective:
    """The losses of a run. Raises UserError for a stage on features without any."""
    method = config.method
    taught, regression = METHODS[method.method].teachers != "none", task.kind == "regression"
    if regression and method.soft_loss != "mse_logits":
        if taught:
            say(f"--soft-loss {method.soft_loss} is constant for one output; this regression uses mse_logits instead.")
        method.soft_loss = "mse_logits"
    features = method.feature_loss if taught else "none"
    if taught and method.feature_epochs and features == "none":
        raise UserError(
            f"--feature-epochs {method.feature_epochs} trains on a feature loss; choose one with --feature-loss."
        )
    return Objective(method.soft_loss, method.temperature, method.alpha, regression, features, method.beta)


def noise_readers(
    config: Config, student: Network, teachers: Sequence[Network], say: Callable[[str], None]
) -> dict[str, Reader]:
    """Who reads training batches with noise, by role; nobody where both probabilities are 0. Networks are told their role."""
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
        shares = " and ".join(
            f"{100 * reader.probability:g} % of the words that the {role} reads" for role, reader in found.items()
        )
        by = {"mask": "the mask token", "vocabulary": "random tokens"}[settings.noise_kind]
        say(f"Noise: in training batches {shares} are replaced by {by}.")
    return found


def check_checkpointing(choice: str, student: Network, teachers: Sequence[Network]) -> None:
    """Raises UserError for a choice that has no second derivatives, or a model whose layers are not known."""
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
    """--layer-map for each teacher, from what of it is trainable now; none where a method compares no weights.

    Raises UserError where two models cannot be compared.
    """
    if METHODS[config.method.method].learn_from != "weights":
        return []
    return [
        layer_map(student.module, teacher.module, config.method.layer_map, (student.name, teacher.name),
                  same_tokens=teacher.encoding == student.encoding)
        for teacher in teachers
    ]  # fmt: skip


def teacher_weights(config: Config, teachers: int) -> list[float] | str | None:
    """--teacher-weights; raises UserError where they do not fit the teachers or the method."""
    given, method = config.method.teacher_weights, config.method.method
    if given is None:
        return None
    if given == "learned":
        if METHODS[method].learn_from != "quiz":
            raise UserError(f"--teacher-weights learned follow the meta-gradient, which --method {method} has not; use "
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
