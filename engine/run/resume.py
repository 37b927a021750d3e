"""The checkpoint of a run: written while a phase is trained, read where an interrupted run goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.run import checkpoint
from engine.run.phase import Phase, Progress
from engine.run.tally import Tally


@dataclass
class Standing:
    """A phase while it is trained: what a checkpoint holds of it beside models and optimizers."""

    phase: Phase
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)  # the student's weights at progress.best_step, on the CPU
    tally: Tally = field(default_factory=Tally)
    starts: list[Tensor] = field(default_factory=list)  # sketches of the teachers that learn, as they were at the start


@dataclass
class Resume:
    """`finished` are the phases that are over; `pending` is a checkpoint that no phase has gone on from yet."""

    file: Path
    identity: str
    finished: dict[str, Progress] = field(default_factory=dict)
    pending: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    @classmethod
    def of(cls, file: Path, identity: str) -> Resume:
        """Of a run that begins with what `identity` says; raises UserError for a checkpoint of another one."""
        if not file.exists():
            return cls(file, identity)
        tensors, saved = checkpoint.load(file)
        if saved["identity"] != identity:
            raise UserError("--resume finds other models or data than the run began with; start a new run in another "
                            "--output.")  # fmt: skip
        finished = {name: Progress.of(progress) for name, progress in saved["finished"].items()}
        return cls(file, identity, finished, (tensors, saved))

    def stands_in(self, phase_name: str) -> bool:
        """Whether the checkpoint was saved in `phase_name`."""
        return self.pending is not None and self.pending[1]["phase"] == phase_name

    def skip(self, phase_name: str) -> None:
        """Drop a checkpoint of a phase whose result is already there."""
        if self.stands_in(phase_name):
            self.pending = None

    def save(self, run: Standing, device: torch.device) -> None:
        state = run.phase.state
        tensors = checkpoint.prefixed("best", run.best) | {"random/cpu": torch.get_rng_state()}
        if device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(device)
        tensors |= {f"start/{k}": start for k, start in enumerate(run.starts)}
        unread, tally = run.tally.saved()
        tensors |= checkpoint.prefixed("tally", unread)
        for i, learner in enumerate(state.learners()):
            counts = {"skipped": learner.skipped, "below_eps": learner.below_eps}
            tensors |= {f"{i}/{name}": count for name, count in counts.items() if count is not None}
            tensors |= checkpoint.prefixed(f"{i}/weights", checkpoint.module_tensors(learner.network.module))
            tensors |= checkpoint.prefixed(f"{i}/optimizer", checkpoint.optimizer_tensors(learner.optimizer))
        checkpoint.save(self.file, tensors, {
            "identity": self.identity,
            "phase": run.phase.name,
            "progress": asdict(run.progress),
            "finished": {name: asdict(p) for name, p in self.finished.items()},
            "round": state.round,
            "tally": tally,
            "schedules": [learner.schedule.last_epoch for learner in state.learners()],
        })  # fmt: skip

    def restore(self, run: Standing, device: torch.device) -> None:
        """Let `run`, its models, optimizers and the random state go on from the pending checkpoint."""
        (tensors, saved), self.pending = self.pending, None
        state = run.phase.state
        for i, learner in enumerate(state.learners()):
            checkpoint.restore_module(learner.network.module, checkpoint.under(f"{i}/weights", tensors))
            checkpoint.restore_optimizer(learner.optimizer, checkpoint.under(f"{i}/optimizer", tensors))
            learner.resume_schedule(saved["schedules"][i])
            for name in ("skipped", "below_eps"):
                if f"{i}/{name}" in tensors:
                    setattr(learner, name, tensors[f"{i}/{name}"].to(device))
        run.best = checkpoint.under("best", tensors)
        run.progress = Progress.of(saved["progress"])
        run.tally = Tally.restored(checkpoint.under("tally", tensors), saved["tally"], device)
        starts = checkpoint.under("start", tensors)
        run.starts = [starts[str(k)].to(device) for k in range(len(starts))]
        state.round = saved["round"]
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], device)
