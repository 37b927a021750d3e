"""Every setting of a run: default, meaning, unit and check stand in one place, a dataclass a component.

The command line and the YAML file are flat (`--teacher-lr 1e-5`, `teacher_lr: 1e-5`); `engine.cli` builds both from
these fields. A default of None is replaced once method and models are known (`engine.run.choices.resolve_defaults`), and
`config.yaml` of a run records the value that was chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from engine.errors import UserError
from engine.plugins import DIVERGENCES, METHODS, PILOTS, STRATEGIES, Plugins, short_name

LARGEST_SEED = 2**63 - 1  # what torch.manual_seed takes
# What a run calls its other stages (engine.run.stages), and what the names of its other phases begin with.
STAGES, PHASES = ("warm up", "features"), ("prepare ", "answers of ")


def option(
    default: Any, help: str, minimum: float | None = None, maximum: float | None = None, *, otherwise: Any = None,
    names: Plugins | None = None,
) -> Any:  # fmt: skip
    """A dataclass field that carries its help text and its closed range of allowed values.

    otherwise  the value that None stands for unless the method's file has another; "--lr" takes over that setting's value
    names      what the value has to be a name of
    """
    known = {"help": help, "minimum": minimum, "maximum": maximum, "otherwise": otherwise, "names": names}
    return field(default=default, metadata=known)


Checkpointing = Literal["none", "student", "teachers", "both"]  # whose layers are recomputed instead of kept


@dataclass
class _Section:
    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """Raises UserError for a value that is out of range, or an unknown name; makes paths absolute."""
        for f in fields(self):
            names = f.metadata.get("names")
            if names is not None and getattr(self, f.name) is not None:
                setattr(self, f.name, names.settle(getattr(self, f.name)))
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
        "Face directory; bert2, or a model named twice, starts from the same weights and is fine-tuned on another sample of the training data")  # fmt: skip
    student: str = option("distilbert", "the model that is distilled into, named as a teacher is")
    student_layers: str | None = option(
        None, "the layers that the student keeps, counted from 0, as in 1,3,5; in an encoder and a decoder the same"
    )
    retrain_teachers: bool = option(False, "fine-tune teachers even if they have a trained classifier already")
    source: Literal["auto", "hub", "embedded"] = option(
        "auto", "where models and data come from that are named: hub; embedded, the demonstration of miniatures and a generated "
        "corpus; or auto, the hub, and the demonstration if the hub cannot be reached")  # fmt: skip


@dataclass
class DataConfig(_Section):
    """data"""

    data: str = option(
        "sst2", "sst2 or another GLUE task or data set of the hub, or a local file or directory of .tsv, .csv, .json(l) or "
        ".parquet files named train, quiz, validation (or dev) and test")  # fmt: skip
    text_column: str | None = option(
        None, "column of the text, or of the first text of a pair; without this flag it is found by its usual names"
    )
    pair_column: str | None = option(None, "column of the second text of a pair")
    label_column: str | None = option(None, "column of the label")
    domain_column: str | None = option(
        None, "column with the name of each example's domain; every split then has the same share of each domain"
    )
    task: Literal["auto", "classification", "regression"] = option(
        "auto", "regression predicts one number; auto takes it if a label has a fraction"
    )
    metric: Literal["auto", "accuracy", "f1", "matthews", "pearson", "spearman"] = option(
        "auto", "the figure that the best model is chosen by and that tables show; auto takes GLUE's own for GLUE's tasks, also in "
        "a local directory with the name of one, else accuracy, or pearson for a regression")  # fmt: skip
    train_size: int = option(30_000, "examples in each teacher's sample; the student trains on the first sample", 1)
    quiz_size: int = option(100, "examples in the quiz set, if it is taken from the training file", 1)
    validation_size: int = option(872, "examples in the validation set, if it is taken from the training file", 1)
    test_size: int = option(2_000, "examples in the test set, if it is taken from the training file", 1)
    split_seed: int = option(
        0, "seed by which data are split; it does not follow --seed, so that all runs are measured on one test set", 0
    )
    target_domain: str = option(
        "all", "the domain that the student learns from and is measured on, by its name in --domain-column; or all"
    )
    target_fraction: float = option(
        1.0, "part of the training examples of --target-domain that student and teachers use", 1e-6, 1.0
    )
    teacher_domains: Literal["all", "target", "others", "each"] = option(
        "all",
        "the domains that teachers are prepared on: all; the target; others, all but the target; each, one teacher for each",
    )
    max_length: int = option(128, "examples are cut to this many tokens, special tokens included", 4)
    length_buckets: int = option(
        16, "number of widths that batches are padded to, at most; they are chosen for each tokenizer so that the training set has "
        "the fewest padded tokens. More widths mean less padding and more shapes of batches", 1)  # fmt: skip


@dataclass
class MethodConfig(_Section):
    """method"""

    method: str = option("metadistil", "how the student is trained", names=METHODS)
    student_warmup_epochs: int = option(
        0, "epochs in which the student is fine-tuned on the labels before it is distilled", 0
    )
    temperature: float | None = option(
        None, "temperature T that divides the logits of student and teachers in the soft loss", 1e-3, otherwise=5.0
    )
    alpha: float | None = option(
        None, "weight of the soft loss; the weight of the hard loss is 1 - alpha", 0.0, 1.0, otherwise=0.5
    )
    soft_loss: str = option("kl", "how the student's logits are compared with the teachers'", names=DIVERGENCES)
    feature_loss: Literal["none", "patient", "tinybert"] | None = option(
        None, "also compare inner states, with the weight --beta: patient compares the normalised state of the token that the "
        "classifier reads in the inner layers, tinybert the attention scores and hidden states of every layer", otherwise="none")  # fmt: skip
    feature_epochs: int | None = option(
        None, "epochs on the feature loss alone, followed by --epochs on the logits alone; 0 adds the feature loss to the loss of "
        "every step", 0, otherwise=0)  # fmt: skip
    feature_map: Literal["skip", "last"] = option(
        "skip", "the teacher layers that the student's layers are compared with: evenly spread ones, or the last ones"
    )
    beta: float | None = option(None, "weight of the feature loss (default: 100 for patient, 1 for tinybert)", 0.0)
    prepare_method: Literal["finetune", "multitask", "meta"] | None = option(
        None, "how teachers are prepared: finetune, on the labels; multitask, with one classifier for each domain; meta, with "
        "examples weighted by how typical they are, and a domain classifier", otherwise="finetune")  # fmt: skip
    domain_loss: Literal["reversal", "shuffled"] = option(
        "reversal", "what makes a meta-teacher's states alike in all domains: a domain classifier whose gradient is reversed, "
        "or a domain classifier that is trained on shuffled domains")  # fmt: skip
    domain_weight: float = option(0.5, "weight of a meta-teacher's domain loss", 0.0)
    prototype_own: float = option(
        0.5, "how typical an example is: weight of its likeness to the mean of its own domain", 0.0
    )
    prototype_others: float | None = option(
        None, "how typical an example is: weight of its likeness to the mean of each other domain (default: (1 - "
        "--prototype-own) / number of other domains)", 0.0)  # fmt: skip
    teacher_weights: str | None = option(
        None, "weights of the teachers in the mean of their logits, as in 0.7,0.3; or learned, by the meta-gradient (default: "
        "equal weights)")  # fmt: skip
    weights_lr: float = option(0.01, "learning rate of learned teacher weights (AdamW on their logarithms)", 0.0)
    meta_grad: str = option("exact", "how the quiz loss is differentiated through the pilot step", names=STRATEGIES)
    checkpointing: Literal[Checkpointing, "selective"] = option(
        "none", "compute activations again in the meta-gradient's backward passes, layer by layer, which saves memory; selective "
        "is refused, because it has no second derivatives")  # fmt: skip
    pilot_optimizer: str | None = option(None, "how the pilot step is taken", otherwise="sgd", names=PILOTS)
    teacher_alpha: float = option(
        0.4, "for teachers that also learn the task (lgtm): weight of a teacher's soft loss against the student's answers; the "
        "weight of its hard loss is 1 - teacher-alpha", 0.0, 1.0)  # fmt: skip
    layer_map: Literal["first", "skip", "last", "both"] = option(
        "skip", "for teachers that follow the student's weights (reptile): the teacher layers that the student's layers are "
        "compared with: the first ones, evenly spread ones, the last ones, or the first and the last ones")  # fmt: skip
    pilot_lr: float | None = option(None, "learning rate of the pilot step", 0.0, otherwise="--lr")
    pilot_steps: int = option(1, "pilot steps in a round, each on a batch of its own", 1)
    independent_masks: bool = option(
        False,
        "draw new dropout masks for the real step; without this flag it uses those of the pilot step, and its forward pass",
    )
    snapshot_store: Literal["device", "pinned"] = option(
        "device", "where the student's weights are kept until it is rewound: on the device, or in pinned host memory"
    )
    teacher_params: str = option(
        "all", "the weights of a teacher that learn while it teaches: all; head; last-N, the last N encoder layers and the head; "
        "lora:R, adapters of rank R and the head (needs peft)")  # fmt: skip
    quiz_batches: int = option(1, "quiz batches in a round, drawn at random", 1)
    cache_teacher_logits: bool = option(
        False, "for frozen teachers (kd): compute their answers on the training set once and keep them in the cache; a step then "
        "takes no time or device memory for teachers")  # fmt: skip

    noise_teacher: float = option(
        0.0, "probability that a word of the teachers' training batches is replaced", 0.0, 1.0
    )
    noise_student: float = option(
        0.0, "probability that a word of the student's training batches is replaced; at equal probabilities student and teachers "
        "read the same words", 0.0, 1.0)  # fmt: skip
    noise_kind: Literal["mask", "vocabulary"] = option(
        "mask", "what replaces a word: the mask token for each of its pieces, or random tokens of the vocabulary"
    )

    def check(self) -> None:
        super().check()
        if self.name in STAGES or self.name.startswith(PHASES):
            raise UserError(
                f"--method is {self.method!r}, but a run calls one of its own stages {self.name!r}; give the file another name."
            )

    @property
    def name(self) -> str:
        """The method's name in a run's phases, figures and directories; a file's is its name without folder and .py."""
        return short_name(self.method)


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
    batch_size: int = option(32, "examples in a batch", 1)
    micro_batch_size: int | None = option(
        None, "examples that go through the models at once, which saves memory: the gradients of a batch's parts are added up "
        "(default: the whole batch)", 1)  # fmt: skip
    epochs: int | None = option(None, "epochs of the student (default: 3)", 1)
    prepare_epochs: int | None = option(None, "epochs of the teachers' fine-tuning (default: 3; miniatures 4)", 1)
    max_steps: int | None = option(None, "optimizer steps of the student, whatever --epochs says", 1)
    warmup_ratio: float = option(0.1, "part of the steps in which the learning rate rises to its peak", 0.0, 1.0)
    weight_decay: float = option(0.01, "weight decay of AdamW for matrices; biases and norms have none", 0.0)
    max_grad_norm: float = option(1.0, "largest norm of all gradients of a model; longer ones are clipped to it", 1e-9)
    optimizer: Literal["flat", "torch", "apex"] = option(
        "flat", "the implementation of AdamW: flat, the engine's own in one pass; torch, its fused one; apex, FusedAdam of NVIDIA's "
        "apex (needs CUDA and a build from source)")  # fmt: skip


@dataclass
class RunConfig(_Section):
    """run"""

    seed: int = option(0, "seed of the student's new weights, of the order of batches and of dropout", 0, LARGEST_SEED)
    teacher_seed: int | None = option(None, "seed of the teachers' fine-tuning (default: --seed)", 0, LARGEST_SEED)
    precision: Literal["fp32", "tf32", "bf16"] = option(
        "fp32", "precision of matrix products; weights and losses stay fp32. tf32 needs a GPU of compute capability 8.0; bf16 needs "
        "such a GPU or a processor with bf16 instructions (other processors compute in fp32)")  # fmt: skip
    device: str = option("auto", "auto, cpu, cuda or cuda:0, cuda:1, ...")
    cuda_graphs: Literal["auto", "on", "off"] = option(
        "auto", "capture a step once for each shape of its batches and replay it with one launch: auto, where that is possible; on, or "
        "else stop with an error; off, never")  # fmt: skip
    compile: bool = option(
        False, "use torch.compile for the encoder layers in passes that are differentiated once; it takes some seconds for each kind "
        "of pass and gives fused kernels on a GPU")  # fmt: skip
    output: str | None = option(None, "directory of the results (default: runs/<time>-<method>)")
    resume: bool = option(False, "continue the interrupted run in --output")
    eval_steps: int | None = option(
        None, "steps between validations (default: one validation at the end of each epoch)", 1
    )
    checkpoint_steps: int = option(500, "steps between checkpoints", 1)
    log_steps: int = option(20, "steps between two lines of metrics", 1)
    cache_dir: str | None = option(
        None,
        "directory of prepared teachers and tokenised data (default: $METADISTIL_CACHE, else ~/.cache/metadistil-engine)",
    )


@dataclass
class TelemetryConfig(_Section):
    """telemetry"""

    telemetry: Literal["on", "off"] = option(
        "on",
        "measure time, memory and energy of each section of a step, and sample the device; it takes less than 1 % of a step's time",
    )
    report_to: str | None = option(
        None, "trackers that also get the figures, comma-separated: wandb, mlflow, trackio; each needs its package and reads its own "
        "environment variables")  # fmt: skip
    metrics_port: int | None = option(
        None, "port at which Prometheus can read the newest figures, under /metrics; 0 takes any free port (needs "
        "prometheus_client)", 0, 65535)  # fmt: skip
    metrics_host: str = option(
        "127.0.0.1",
        "address at which --metrics-port listens; with 0.0.0.0 every machine that reaches it can read the figures",
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
