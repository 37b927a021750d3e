"""One job from settings to exported student, step by step."""

from __future__ import annotations

import time
from contextlib import closing

from engine import cli
from engine.config import Config
from engine.run.choices import settle_device
from engine.run.examples import encode
from engine.run.inputs import read_inputs
from engine.run.interrupts import Interrupts
from engine.run.losses import plan_losses
from engine.run.machine import prepare_machine
from engine.run.members import load_models
from engine.run.output import OutputDirectory
from engine.run.probe import probe
from engine.run.results import close
from engine.run.resume import Resume
from engine.run.setup import Setup
from engine.run.stages import Stages
from engine.run.trainer import Trainer
from engine.screen.console import Console
from engine.telemetry import trackers
from engine.telemetry.monitor import Monitor
from engine.telemetry.sinks import Sink
from engine.telemetry.telemetry import Telemetry


def run(
    config: Config, output: OutputDirectory, console: Console, interrupts: Interrupts, started: float, command: str
) -> None:
    """`command` is what was typed, and `started` when, on the monotonic clock.

    Raises UserError for bad input before the output directory exists, and Interrupted when a signal stops the run.
    """
    sinks = trackers.chosen(config.telemetry)  # first: it takes no time to say that one cannot be had
    setup = set_up(config, console)
    # a step whose operations are counted would not be compiled
    telemetry = Telemetry(setup.device, config.telemetry.telemetry == "on", flops=not config.run.compile)
    with closing(output):
        output.create()
        output.write("config.yaml", cli.dump(config))
        stages = train(setup, output, sinks, telemetry, interrupts)
        # step 8, with which the directory is complete
        close(setup, stages, telemetry, output, time.monotonic() - started, command)


def set_up(config: Config, console: Console) -> Setup:
    """Steps 1 to 6. Raises UserError for settings, data and models that cannot be used or do not fit each other."""
    device = settle_device(config, console.say)
    inputs = read_inputs(config, console)
    models = load_models(config, inputs, device, console)
    examples = encode(config, inputs, models, console)
    student, teachers = models.student.network, models.taught()
    losses = plan_losses(config, inputs.splits.task, student, teachers, console.say)
    fused = bool(teachers) and losses.objective.divergence.fused
    prepare_machine(config, device, [*teachers, student], models.compiled, fused, console)
    setup = Setup(config, console, device, inputs.cache, models, examples, losses)
    probe(setup)
    return setup


def train(
    setup: Setup, output: OutputDirectory, sinks: list[Sink], telemetry: Telemetry, interrupts: Interrupts
) -> Stages:
    """Step 7: all stages. They are returned with what they left: teachers, kept answers, learned weights."""
    config, console = setup.config, setup.console
    told = {"settings": config.to_flat(), "say": console.say, "warn": console.warn}
    with Monitor(output.path, sinks, **told) as monitor, closing(telemetry):
        resume = Resume.of(output.checkpoint, setup.identity())
        trainer = Trainer(config.run, setup.task, setup.device, resume, console, monitor, telemetry, interrupts)
        stages = Stages(setup, trainer)
        stages.run()
    return stages
