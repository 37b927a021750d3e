"""One job from configuration to exported student: what it is made of, its phases in order, what it leaves behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine import report
from engine.config import Config
from engine.console import Console
from engine.data.batches import LengthGroupedBatches, QuizBatches
from engine.data.encode import EncodedSplit, Encoding
from engine.data.splits import content_hash, load_splits
from engine.errors import UserError
from engine.evaluation import predict, primary, score
from engine.hub import Hub
from engine.interrupts import Interrupts
from engine.metagrad import STRATEGIES
from engine.methods import STEPS, State
from engine.models import Loaded, ModelSource, keep_layers, load_model, resolve_models
from engine.monitor import Monitor
from engine.network import Learner, Network
from engine.objectives import Objective
from engine.output import OutputDirectory
from engine.teachers import Teacher, prepare
from engine.time_machine import TimeMachine
from engine.trainer import Phase, Plan, Trainer

PAPER = {"lr": 6e-5, "teacher_lr": 6e-5, "prepare_lr": 6e-5, "epochs": 3, "prepare_epochs": 3}


class Job:
    """Builds everything on construction, so that bad input is known before the output directory exists."""

    def __init__(self, config: Config, console: Console):
        self.config, self.console = config, console
        self.device = choose_device(config.run.device, config.run.precision)
        hub = Hub(config.models.source)
        teaches = config.method.method != "finetune"
        given = [item.strip() for item in config.models.teachers.split(",") if item.strip()] if teaches else []
        if teaches and not given:
            raise UserError(f"--method {config.method.method} needs --teachers; name at least one.")
        self.sources = resolve_models(given, hub, console.say)
        (self.student_source,) = resolve_models([config.models.student], hub, console.say)
        self.splits = load_splits(config.data, max((s.sample for s in self.sources), default=0) + 1, hub, console.say)
        self.task = self.splits.task
        resolve_defaults(config, self.student_source, self.sources)
        self._announce(hub)
        self._load()
        self._encode()
        self.objective = self._objective()

    def run(self, output: OutputDirectory, interrupts: Interrupts) -> None:
        """Prepare the teachers, warm the student up, distil it. Raises Interrupted when a signal stops it."""
        config, method = self.config, self.config.method
        self.monitor = Monitor(output.path)
        self.trainer = Trainer(config.run, self.task, self.device, output.path, self.console, self.monitor, interrupts)
        with attention(self.device, method.method):
            self.teachers = [self._prepare(i) for i in range(len(self.sources))]
            if method.student_warmup_epochs and not self.trainer.stands_in(method.method):
                self._fit("warm up", "finetune", method.student_warmup_epochs)
            self._fit(method.method, method.method, config.optim.epochs, config.optim.max_steps)

    def close(self, output: OutputDirectory, seconds: float) -> None:
        """Measure every model once on validation and test, export, write the summary, show the table."""
        entries, logits = [], {}
        networks = [*(t.network for t in self.teachers), self.student]
        with attention(self.device, "evaluation"):
            for network in networks:
                network.module.to(self.device)
                logits = {s: predict(network, getattr(self.encoded, s), self.device) for s in ("validation", "test")}
                metrics = {s: score(z, getattr(self.encoded, s).labels, self.task) for s, z in logits.items()}
                entries.append({"name": network.name, "parameters": network.size(), "metrics": metrics})
        *teachers, student = entries
        for entry, teacher in zip(teachers, self.teachers, strict=True):
            entry |= {"source": teacher.source.describe(), "origin": teacher.origin, "sample": teacher.source.sample,
                      "prepared": {"validation": teacher.progress.best, "seconds": teacher.progress.seconds,
                                   "best_step": teacher.progress.best_step}}  # fmt: skip
        progress = self.trainer.finished
        student |= {
            "source": self.student_source.describe(),
            "best_step": progress[self.config.method.method].best_step,
        }
        phases = {f"prepare {t.network.name}": t.progress for t in self.teachers if t.origin != "as given"} | progress
        summary = report.summarise(
            self.config, self.task, primary(self.task), self._source_kinds(), teachers, student,
            {name: {"seconds": p.seconds, "steps": p.step, "examples_per_second": p.examples_per_second()}
             for name, p in phases.items()},
            seconds=seconds, padding_waste=self.padding_waste, peak_memory=report.peak_memory(self.device),
            device=report.hardware(self.device), sizes=self._sizes(), notes=self.splits.notes,
        )  # fmt: skip
        data = f"{self.config.data.data} ({self.splits.source}); " + ", ".join(
            f"{k} {v}" for k, v in self._sizes().items()
        )
        for teacher, entry in zip(self.teachers, teachers, strict=True):
            folder = output.path / "teachers" / teacher.network.name
            card = report.model_card(summary, entry, "a teacher", data)
            report.export(teacher.network.module, teacher.tokenizer, folder, card)
        card = report.model_card(summary, student, "the student", data)
        report.export(self.student.module, self.student_tokenizer, output.path / "student", card)
        for split, values in logits.items():
            file = output.path / "predictions" / f"{split}.jsonl"
            report.write_predictions(file, getattr(self.splits, split), values, self.task)
        self.monitor.close()
        output.write("summary.json", summary)
        self.trainer.file.unlink(missing_ok=True)
        if summary["source"] == "embedded":
            self.console.banner("EMBEDDED DEMONSTRATION", report.DEMONSTRATION)
        self.console.table(**report.closing_table(summary))
        self.console.say(f"Results: {output.path} ({seconds:.0f} s)")

    def _announce(self, hub: Hub) -> None:
        embedded = [s.given for s in [*self.sources, self.student_source] if s.kind == "embedded"]
        if self.splits.source == "embedded":
            embedded.append(f"data {self.config.data.data}")
        if embedded:
            why = "--source embedded was given" if self.config.models.source == "embedded" else f"the hub cannot be reached ({hub.why})"  # fmt: skip
            self.console.banner("EMBEDDED DEMONSTRATION", f"{', '.join(embedded)}: {why}.\n{report.DEMONSTRATION}")
        for source in [*self.sources, self.student_source]:
            self.console.say(f"{source.name}: {source.describe()}")

    def _load(self) -> None:
        config = self.config

        def texts() -> list[str]:
            sample = self.splits.train[0]
            return [*sample["text"], *(sample["pair"] if self.task.pair else [])]

        self.loaded = [load_model(s, self.task, texts, config.run.teacher_seed) for s in self.sources]
        student = load_model(self.student_source, self.task, texts, config.run.seed)
        if config.models.student_layers is not None:
            keep_layers(student.module, _layer_numbers(config.models.student_layers))
        self.student_loaded, self.student_tokenizer = student, student.tokenizer
        if self.device.type == "cpu" and all(s.kind == "embedded" for s in [*self.sources, self.student_source]):
            torch.set_num_threads(1)  # the miniatures' operations are too small to share
        sizes = [sum(p.numel() for p in x.module.parameters()) for x in [*self.loaded, student]]
        for source, size in zip(self.sources, sizes[:-1], strict=True):
            if sizes[-1] > size:
                self.console.warn(
                    f"the student has {sizes[-1]:,} parameters, its teacher {source.name} only {size:,}; a student is "
                    "meant to be smaller.")  # fmt: skip

    def _encode(self) -> None:
        config, splits = self.config, self.splits
        cache = self.cache / "tokens"
        precision = config.run.precision
        encodings: dict[str, Encoding] = {}

        def network(name: str, loaded: Loaded) -> Network:
            length = min(config.data.max_length, loaded.max_length)
            if length < config.data.max_length:
                self.console.say(f"{name} reads at most {length} tokens; --max-length {config.data.max_length} is cut to that.")  # fmt: skip
            encoding = Encoding.of(loaded.tokenizer, length)
            encodings[encoding.key] = encoding
            return Network(name, loaded.module, encoding.key, precision)

        self.teacher_networks = [network(s.name, x) for s, x in zip(self.sources, self.loaded, strict=True)]
        layers = config.models.student_layers
        name = self.student_source.name + (f"[{layers}]" if layers else "")
        self.student = network(name, self.student_loaded)
        self.hashes = {}

        def encoded(name: str, dataset) -> EncodedSplit:
            self.hashes[name] = content_hash(dataset)
            return EncodedSplit(dataset, list(encodings.values()), self.hashes[name], cache)

        class Encoded:
            train = [encoded(f"train{i}", sample) for i, sample in enumerate(splits.train)]
            quiz = encoded("quiz", splits.quiz)
            validation = encoded("validation", splits.validation)
            test = encoded("test", splits.test)

        self.encoded = Encoded
        sampler = LengthGroupedBatches(Encoded.train[0].lengths, config.optim.batch_size, config.run.seed)
        self.padding_waste = round(Encoded.train[0].padding_waste(list(sampler)), 4)

    def _objective(self) -> Objective:
        method = self.config.method
        soft, regression = method.soft_loss, self.task.kind == "regression"
        if regression and soft != "mse_logits" and method.method != "finetune":
            self.console.say(f"--soft-loss {soft} is constant for one output; a regression uses mse_logits instead.")
            soft = method.soft_loss = "mse_logits"
        return Objective(soft, method.temperature, method.alpha, regression)

    def _prepare(self, i: int) -> Teacher:
        source, loaded = self.sources[i], self.loaded[i]
        return prepare(
            self.config, source, self.teacher_networks[i], loaded.tokenizer, loaded.trained_head,
            self.encoded.train[source.sample], self.encoded.validation,
            (self.hashes[f"train{source.sample}"], self.hashes["validation"]), self.objective, self.trainer, self.cache,
        )  # fmt: skip

    def _fit(self, phase_name: str, method: str, epochs: int, max_steps: int | None = None) -> None:
        config, train = self.config, self.encoded.train[0]
        optim, settings = config.optim, config.method
        meta = method == "metadistil"
        plan = Plan(-(-len(train) // optim.batch_size), epochs, max_steps, settings.pilot_steps if meta else 1)
        common = {"warmup_ratio": optim.warmup_ratio, "weight_decay": optim.weight_decay,
                  "max_grad_norm": optim.max_grad_norm}  # fmt: skip
        state = State(Learner.adamw(self.student, lr=optim.lr, steps=plan.steps, **common), self.objective)
        networks = [teacher.network for teacher in self.teachers]
        if meta:
            state.learning_teachers = [
                Learner.adamw(n, lr=optim.teacher_lr, steps=plan.rounds, **common) for n in networks
            ]
            state.time_machine = TimeMachine(self.student.module.to(self.device))
            state.meta_gradient, state.pilot_lr = STRATEGIES[settings.meta_grad], settings.pilot_lr
            state.quiz = QuizBatches(
                self.encoded.quiz, optim.batch_size, settings.quiz_batches, config.run.seed, self.device
            )
        elif method == "kd":
            state.teachers = networks
        self.trainer.fit(
            Phase(
                phase_name,
                STEPS[method],
                state,
                train,
                self.encoded.validation,
                plan,
                optim.batch_size,
                config.run.seed,
            )
        )

    @property
    def cache(self) -> Path:
        given = self.config.run.cache_dir or os.environ.get("METADISTIL_CACHE") or "~/.cache/metadistil-engine"
        return Path(given).expanduser()

    def _source_kinds(self) -> dict[str, object]:
        return {"data": self.splits.source, "student": self.student_source.kind, "teachers": [s.kind for s in self.sources]}  # fmt: skip

    def _sizes(self) -> dict[str, int]:
        sizes = {f"train{'' if i == 0 else i + 1}": len(s) for i, s in enumerate(self.splits.train)}
        return sizes | {name: len(getattr(self.splits, name)) for name in ("quiz", "validation", "test")}


def choose_device(given: str, precision: str) -> torch.device:
    """The device of `--device`; raises UserError where it does not exist or cannot do the precision."""
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
        if precision == "bf16" and not torch.cuda.is_bf16_supported():
            raise UserError("--precision is bf16, which this CUDA device cannot do; use --precision fp32.")
    return device


def resolve_defaults(config: Config, student: ModelSource, teachers: Sequence[ModelSource]) -> None:
    """Fill in what was left to the models: the paper's settings, or those that suit the embedded miniatures."""
    by_student = _defaults_for([student])
    by_teachers = _defaults_for(teachers)
    optim = config.optim
    for name, defaults in {"lr": by_student, "epochs": by_student, "teacher_lr": by_teachers,
                           "prepare_lr": by_teachers, "prepare_epochs": by_teachers}.items():  # fmt: skip
        if getattr(optim, name) is None:
            setattr(optim, name, defaults[name])
    if config.method.pilot_lr is None:
        config.method.pilot_lr = optim.lr
    if config.run.teacher_seed is None:
        config.run.teacher_seed = config.run.seed


def _defaults_for(sources: Sequence[ModelSource]) -> dict[str, float]:
    if not any(source.kind == "embedded" for source in sources):
        return PAPER
    from engine.embedded import DEFAULTS

    return DEFAULTS


def attention(device: torch.device, method: str):
    """Math attention where the derivatives need it (forward mode, double backward), and on the CPU, where it is the
    faster one at short lengths; the fused kernels otherwise."""
    return sdpa_kernel(SDPBackend.MATH) if method == "metadistil" or device.type == "cpu" else nullcontext()


def _layer_numbers(given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as e:
        raise UserError(f"--student-layers is {given!r}; give layer numbers counted from 0, as in 1,3,5.") from e
