"""Every setting of a run: default, meaning, unit and check stand in one place, a dataclass a component.

The command line and the YAML file are flat (`--teacher-lr 1e-5`, `teacher_lr: 1e-5`); `engine.cli` builds both from
these fields. A default of None means "chosen when the models are known"; `resolve_defaults` fills it in, and what was
chosen is what `config.yaml` of a run records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from engine.errors import UserError

LARGEST_SEED = 2**63 - 1  # what torch.manual_seed takes


def option(default: Any, help: str, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A dataclass field that carries its help text and its closed range of allowed values."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


@dataclass
class _Section:
    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata.get("minimum"), f.metadata.get("maximum")
            if value is None or (low is None and high is None):
                continue
            # `not (a >= b)` rather than `a < b`, so that nan is refused as well
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                allowed = f"at least {low}" if high is None else f"from {low} to {high}"
                raise UserError(f"--{f.name.replace('_', '-')} is {value}; it must be {allowed}.")
            if math.isinf(value):
                raise UserError(f"--{f.name.replace('_', '-')} is {value}; it must be a finite number.")


@dataclass
class ModelConfig(_Section):
    """models"""

    teachers: str = option(
        "bert", "one or more teachers, comma-separated: bert, roberta, distilbert, tinybert, a hub id or a local Hugging "
        "Face directory; bert2, or a source given twice, is the same start fine-tuned on the next disjoint sample")  # fmt: skip
    student: str = option("distilbert", "the model to distil into, named like a teacher")
    student_layers: str | None = option(
        None, "keep only these encoder layers of the student, counted from 0, as in 1,3,5"
    )
    retrain_teachers: bool = option(False, "fine-tune teachers also where they already have a trained head")
    source: Literal["auto", "hub", "embedded"] = option(
        "auto", "where named models and data come from: the hub only, the embedded demonstration, or the hub and the "
        "demonstration where the hub cannot be reached")  # fmt: skip


@dataclass
class DataConfig(_Section):
    """data"""

    data: str = option(
        "sst2", "sst2 or another GLUE task or data set of the hub, or a local file or directory of .tsv, .csv, .json(l) or "
        ".parquet files named train, quiz, validation (or dev) and test")  # fmt: skip
    text_column: str | None = option(None, "column of the (first) text; found by its usual names when not given")
    pair_column: str | None = option(None, "column of the second text of a pair")
    label_column: str | None = option(None, "column of the label")
    domain_column: str | None = option(
        None, "column that names each example's domain; every cut then holds each domain in its share"
    )
    task: Literal["auto", "classification", "regression"] = option(
        "auto", "regression predicts one number; auto takes it when a label has a fraction"
    )
    metric: Literal["auto", "accuracy", "f1", "matthews", "pearson", "spearman"] = option(
        "auto", "what the best model is chosen by and tables show; auto takes GLUE's own for its tasks, also where a local "
        "directory has the name of one, else accuracy, or for a regression pearson")  # fmt: skip
    train_size: int = option(30_000, "examples in each teacher's sample; students train on the first sample", 1)
    quiz_size: int = option(100, "examples in the quiz set, where it is cut from the training file", 1)
    validation_size: int = option(872, "examples in the validation set, where it is cut from the training file", 1)
    test_size: int = option(2_000, "examples in the test set, where it is cut from the training file", 1)
    split_seed: int = option(
        0, "seed of the cuts; the same for every --seed, so that runs are compared on one test set", 0
    )
    target_domain: str = option(
        "all", "the domain that the student learns from and is measured on, by its name in --domain-column, or all"
    )
    target_fraction: float = option(
        1.0, "part of the training examples of --target-domain that is used, by student and teachers", 1e-6, 1.0
    )
    teacher_domains: Literal["all", "target", "others", "each"] = option(
        "all", "the domains that teachers are prepared on: all, the target, all but the target, or one teacher for each"
    )
    max_length: int = option(128, "tokens an example is cut to, special tokens included", 4)
    length_buckets: int = option(
        16, "widths at most that batches are padded to, chosen for each tokenizer so that the training set has the fewest "
        "padded tokens; more of them pad less and make more shapes", 1)  # fmt: skip


@dataclass
class MethodConfig(_Section):
    """method"""

    method: Literal["metadistil", "lgtm", "reptile", "metakd", "kd", "finetune"] = option(
        "metadistil", "how the student is trained: by teachers that learn to teach it (metadistil, lgtm) or "
        "follow it (reptile), by meta-teachers of several domains (metakd), by frozen teachers (kd), by labels alone (finetune)")  # fmt: skip
    student_warmup_epochs: int = option(0, "epochs of plain fine-tuning of the student before it is distilled", 0)
    temperature: float | None = option(
        None, "softmax temperature T of both sides of the soft loss (default: 5; metakd 2, lgtm 1)", 1e-3
    )
    alpha: float | None = option(
        None, "weight of the soft loss; the hard loss has 1 - alpha (default: 0.5; metakd, lgtm 1)", 0.0, 1.0
    )
    soft_loss: Literal["kl", "mse_prob", "mse_logits"] = option(
        "kl", "T^2 KL between softened probabilities, T^2 mean squared error of them, or of the logits"
    )
    feature_loss: Literal["none", "patient", "tinybert"] | None = option(
        None, "patient adds --beta times the mean squared difference of the inner layers' normalised first states; tinybert "
        "that of the attention scores and hidden states of every layer (default: none; metakd tinybert)")  # fmt: skip
    feature_epochs: int | None = option(
        None, "epochs on the feature loss alone, before those on the logits alone; 0 adds it to the loss of every step "
        "(default: 0; metakd --epochs)", 0)  # fmt: skip
    feature_map: Literal["skip", "last"] = option(
        "skip", "which teacher layers the student's layers are matched with: evenly spread, or the last ones"
    )
    beta: float | None = option(None, "weight of the feature loss (default: 100; tinybert 1)", 0.0)
    prepare_method: Literal["finetune", "multitask", "meta"] | None = option(
        None, "how teachers are prepared: finetune; multitask, with a head for each domain; meta, examples weighted by how "
        "typical they are, against a domain classifier (default: finetune; metakd meta)")  # fmt: skip
    domain_loss: Literal["reversal", "shuffled"] = option(
        "reversal", "what makes a meta-teacher's states alike in all domains: a domain classifier whose gradient is reversed, "
        "or one that is taught shuffled domains")  # fmt: skip
    domain_weight: float = option(0.5, "weight of the domain loss of a meta-teacher", 0.0)
    prototype_own: float = option(
        0.5, "what nearness to its own domain's prototype counts in how typical an example is", 0.0
    )
    prototype_others: float | None = option(
        None,
        "what nearness to each other domain's prototype counts (default: (1 - --prototype-own) / number of others)",
        0.0,
    )
    teacher_weights: str | None = option(
        None,
        "weights of the teachers' logits in their mean, as in 0.7,0.3, or learned, by the meta-gradient (default: equal)",
    )
    weights_lr: float = option(0.01, "learning rate of learned teacher weights (AdamW on their logarithms)", 0.0)
    meta_grad: Literal["exact", "double_backward", "finite_difference", "first_order"] = option(
        "exact",
        "how metadistil differentiates the quiz loss through the pilot step: exact and double_backward agree to rounding; "
        "finite_difference is approximate and needs no forward-mode derivatives of the student; first_order sees the "
        "student's last layer only",
    )
    checkpointing: Literal["none", "student", "teachers", "both", "selective"] = option(
        "none", "recompute activations layer by layer in the meta-gradient's backward passes, for memory; selective is "
        "refused: it has no second derivatives")  # fmt: skip
    pilot_optimizer: Literal["sgd", "adamw"] | None = option(
        None,
        "the pilot's step: plain SGD, or AdamW from the moments of the student's own optimizer (default: sgd; lgtm adamw)",
    )
    teacher_alpha: float = option(
        0.4,
        "lgtm: weight of a teacher's soft loss against the student's answers; its hard loss has 1 - teacher-alpha",
        0.0,
        1.0,
    )
    layer_map: Literal["first", "skip", "last", "both"] = option(
        "skip", "reptile: which teacher layers the student's layers are compared with: the first ones, evenly spread ones, "
        "the last ones, or first and last ones together")  # fmt: skip
    pilot_lr: float | None = option(None, "step size of the pilot's step (default: --lr)", 0.0)
    pilot_steps: int = option(1, "pilot batches a round", 1)
    independent_masks: bool = option(
        False, "draw new dropout masks for the real step; otherwise it has the pilot's, and shares its forward"
    )
    snapshot_store: Literal["device", "pinned"] = option(
        "device", "where the time machine keeps the student's weights: on the device, or in pinned host memory"
    )
    teacher_params: str = option(
        "all", "which of a teacher's weights the meta-updates train: all, head, last-N (encoder layers and head), or lora:R "
        "(adapters of rank R and head; needs peft)")  # fmt: skip
    quiz_batches: int = option(1, "quiz batches a round, drawn at random", 1)
    cache_teacher_logits: bool = option(
        False, "with frozen teachers (kd): compute what they answer on the training set once, and keep it in the cache; they "
        "then take no time of a step, and no memory on the device")  # fmt: skip

    noise_teacher: float = option(
        0.0, "probability that a word of what teachers read in training batches is replaced", 0.0, 1.0
    )
    noise_student: float = option(
        0.0, "the same for the student, which at equal probabilities reads what they read", 0.0, 1.0
    )
    noise_kind: Literal["mask", "vocabulary"] = option(
        "mask", "what a word is replaced by: the tokenizer's mask token for each of its pieces, or random tokens"
    )


@dataclass
class OptimConfig(_Section):
    """optimisation"""

    lr: float | None = option(None, "peak learning rate of the student (default: 6e-5; miniatures 1e-3)", 0.0)
    teacher_lr: float | None = option(
        None, "peak learning rate of the teachers' meta-updates (default: 1e-5; miniatures 3e-5)", 0.0
    )
    prepare_lr: float | None = option(
        None, "peak learning rate of the teachers' fine-tuning (default: 6e-5; miniatures 1e-3)", 0.0
    )
    batch_size: int = option(32, "examples a batch", 1)
    micro_batch_size: int | None = option(
        None, "examples that go through the models at once, for memory: a batch's gradients are added up over its parts "
        "(default: the whole batch)", 1
    )  # fmt: skip
    epochs: int | None = option(None, "epochs of the student (default: 3)", 1)
    prepare_epochs: int | None = option(None, "epochs of the teachers' fine-tuning (default: 3; miniatures 4)", 1)
    max_steps: int | None = option(None, "train the student for this many optimizer steps, whatever --epochs says", 1)
    warmup_ratio: float = option(0.1, "part of the steps over which the learning rate rises to its peak", 0.0, 1.0)
    weight_decay: float = option(0.01, "AdamW weight decay of matrices; biases and norms have none", 0.0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this global norm", 1e-9)
    optimizer: Literal["flat", "torch", "apex"] = option(
        "flat", "whose AdamW steps students and teachers: the engine's own in one pass, torch's fused one, or FusedAdam of "
        "NVIDIA's apex (CUDA; built from its source)")  # fmt: skip


@dataclass
class RunConfig(_Section):
    """run"""

    seed: int = option(0, "seed of initialisation, batch order and dropout of the student", 0, LARGEST_SEED)
    teacher_seed: int | None = option(None, "seed of the teachers' fine-tuning (default: --seed)", 0, LARGEST_SEED)
    precision: Literal["fp32", "tf32", "bf16"] = option(
        "fp32", "products of forward and backward; weights and losses stay fp32. tf32 needs a GPU of compute capability 8.0, "
        "bf16 one too, or a processor with bf16 instructions (others compute in fp32)")  # fmt: skip
    device: str = option("auto", "auto, cpu, cuda or cuda:0, cuda:1, ...")
    cuda_graphs: Literal["auto", "on", "off"] = option(
        "auto", "capture a step once for each shape of its batches and replay it with one launch; auto: where that can be "
        "done, on: or stop")  # fmt: skip
    compile: bool = option(
        False, "torch.compile the encoder layers in passes that are differentiated once: fused kernels for a GPU, seconds of "
        "compiling for each kind of pass")  # fmt: skip
    output: str | None = option(None, "directory of the results (default: runs/<time>-<method>)")
    resume: bool = option(False, "continue the interrupted run in --output")
    eval_steps: int | None = option(None, "validate every so many steps (default: at the end of each epoch)", 1)
    checkpoint_steps: int = option(500, "save a checkpoint every so many steps", 1)
    log_steps: int = option(20, "read and write metrics every so many steps", 1)
    cache_dir: str | None = option(
        None, "prepared teachers and tokenised data (default: $METADISTIL_CACHE, else ~/.cache/metadistil-engine)"
    )


@dataclass
class TelemetryConfig(_Section):
    """telemetry"""

    telemetry: Literal["on", "off"] = option(
        "on", "measure time, memory and energy by section of a step, and sample the device; below 1 % of a step's time"
    )
    report_to: str | None = option(
        None, "trackers that also get the figures, comma-separated: wandb, mlflow, trackio; each needs its own package, and is "
        "set up by its own environment variables")  # fmt: skip
    metrics_port: int | None = option(
        None,
        "serve the newest figures to Prometheus at this port, under /metrics; 0 takes any free port; needs prometheus_client",
        0,
        65535,
    )
    metrics_host: str = option(
        "127.0.0.1", "where --metrics-port listens; 0.0.0.0 lets every machine that reaches it read"
    )


@dataclass
class Config:
    """All sections of one run."""

    models: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Config:
        """Build the sections from one flat mapping of field name to value; raises UserError on a value out of range."""
        sections = {f.name: f.default_factory for f in fields(cls)}
        return cls(**{
            name: section(**{f.name: values[f.name] for f in fields(section) if f.name in values})
            for name, section in sections.items()
        })  # fmt: skip

    def to_flat(self) -> dict[str, Any]:
        """The flat mapping that `from_flat` reads, in order of declaration."""
        return {f.name: getattr(section, f.name) for section in self.sections() for f in fields(section)}

    def sections(self) -> list[_Section]:
        return [getattr(self, f.name) for f in fields(self)]
