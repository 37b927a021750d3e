"""What the first steps made, as the later ones read it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import Config
from engine.data.splits import Task
from engine.models.load import content_hash
from engine.run.examples import Examples
from engine.run.losses import Losses
from engine.run.members import Models
from engine.screen.console import Console


@dataclass
class Setup:
    """Settings, device, models, data and losses of one run; `cache` is the folder for what later runs can use again."""

    config: Config
    console: Console
    device: torch.device
    cache: Path
    models: Models
    examples: Examples
    losses: Losses

    @property
    def task(self) -> Task:
        return self.examples.splits.task

    def identity(self) -> str:
        """What a checkpoint belongs to: every example and every weight that this run begins with."""
        members = [*self.models.teachers, self.models.student]
        hashes = [
            self.examples.encoded.hashes,
            *(self.examples.of_teacher(member.source).hashes for member in self.models.teachers),
        ]
        weights = [content_hash(member.network.module) for member in members]
        return hashlib.sha256(json.dumps([hashes, weights]).encode()).hexdigest()
