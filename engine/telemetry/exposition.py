"""The newest measurements in Prometheus' text format 0.0.4.

The flat keys of `metrics.jsonl` become families with labels: "seconds/pilot" of the phase "metadistil" is
`metadistil_seconds{phase="metadistil",section="pilot"}`. A family's unit is the last word of its name where it has one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from engine.telemetry.sinks import numbers

PREFIX = "metadistil_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Key -> family and help. What stands here alone belongs to a phase.
SINGLE = {
    "step": ("step", "Optimizer steps of the student that the phase has taken."),
    "time": ("logged_timestamp_seconds", "When the newest figures were logged, in seconds since 1970."),
    "epoch": ("epoch", "Passes over the training set that the phase has made."),
    "lr": ("learning_rate", "Learning rate of the model that the phase trains."),
    "examples_per_second": ("examples_per_second", "Training examples a second."),
    "tokens_per_second": ("tokens_per_second", "Padded tokens a second that the student reads."),
    "flops_per_second": (
        "flops_per_second",
        "Floating-point operations a second: of one step they are counted, of others they follow from the shapes.",
    ),
    "step_seconds": ("step_seconds", "Mean seconds a step took."),
    "joules_per_step": ("joules_per_step", "Energy a step took."),
    "joules_per_example": ("joules_per_example", "Energy a training example took."),
    "memory/allocated": ("memory_allocated_bytes", "Device memory that tensors take."),
    "memory/reserved": ("memory_reserved_bytes", "Device memory that the allocator holds."),
}
# Key -> family and help of what the machine is measured by; of the machine, whatever the phase.
MACHINE = {
    "host/resident": ("host_resident_bytes", "Resident memory of the process."),
    "host/cpu": ("host_cpu_percent", "Processor time of the process, in percent of one core."),
    "device/memory_used": ("device_memory_used_bytes", "Memory of the device in use, by anybody."),
    "device/memory_reserved": ("device_memory_reserved_bytes", "Memory of the device that its driver keeps."),
    "device/memory_total": ("device_memory_total_bytes", "Memory of the device."),
    "device/memory_process": ("device_memory_process_bytes", "Memory of the device that this process takes."),
    "device/utilization": ("device_utilization_percent", "Share of the time in which a kernel ran."),
    "device/memory_utilization": ("device_memory_utilization_percent", "Share of the time in which memory was read or written."),
    "device/sm_clock": ("device_sm_clock_megahertz", "Clock of the multiprocessors."),
    "device/memory_clock": ("device_memory_clock_megahertz", "Clock of the device's memory."),
    "device/temperature": ("device_temperature_celsius", "Temperature of the device."),
    "device/power": ("device_power_watts", "Power that the device draws."),
    "device/power_limit": ("device_power_limit_watts", "Power that the device may draw."),
    "device/energy": ("device_energy_joules", "Energy that the device took since the run began."),
    "device/throttle_reasons": ("device_throttle_reasons", "Why clocks are held back, as NVML's bit mask."),
    "device/pcie_tx": ("device_pcie_tx_bytes_per_second", "What the device sends over PCI Express."),
    "device/pcie_rx": ("device_pcie_rx_bytes_per_second", "What the device receives over PCI Express."),
    "device/pcie_generation": ("device_pcie_generation", "Generation of the PCI Express link."),
    "device/pcie_width": ("device_pcie_width", "Lanes of the PCI Express link."),
}  # fmt: skip
# Before the slash -> family, the label that has what comes after it, and help.
GROUPS = {
    "seconds": ("seconds", "section", "Mean seconds that a step spends in a section of it."),
    "memory": ("memory_bytes", "section", "Peak memory in a section of the step."),
    "joules": ("joules", "section", "Energy that a step takes in a section of it."),
    "lr": ("teacher_learning_rate", "teacher", "Learning rate of a teacher that learns with its student."),
    "drift": ("drift", "teacher", "How far a teacher's weights are from where they began, relative to their norm."),
    "validation": ("validation", "metric", "A metric on the validation set."),
}
RUN = ("run_info", "The run: always 1.")
OTHER = ("value", "A figure of the run that has no family of its own.")
LASTING = ("step", "epoch", "validation", "drift")  # families that stay true of a phase when it is over

Sample = tuple[str, str, tuple[tuple[str, str], ...]]  # family, its help, labels


def sample(phase: str, key: str) -> Sample:
    """The family, help and labels of a flat key; different keys never share family and labels."""
    if key in MACHINE:
        return *MACHINE[key], ()
    labels = (("phase", phase),)
    if key in SINGLE:
        return *SINGLE[key], labels
    group, slash, rest = key.partition("/")
    if slash and group in GROUPS:
        family, label, help = GROUPS[group]
        return family, help, (*labels, (label, rest))
    if number := re.fullmatch(r"weight_([1-9][0-9]*)", key):
        return (
            "teacher_weight",
            "Weight of a teacher in the mean of logits, counted from 1.",
            (*labels, ("teacher", number[1])),
        )
    if re.fullmatch(r"([a-z][a-z0-9]*_)?loss", key):
        return key, f"Mean {key.replace('_', ' ')} since figures were logged before.", labels
    return *OTHER, (*labels, ("name", key))


class Gauges:
    """What was logged last, by family and labels. Not for several threads: its owner has the lock."""

    def __init__(self, run: Mapping[str, str]):
        self._phase: str | None = None
        self._families: dict[str, tuple[str, dict[tuple[tuple[str, str], ...], float]]] = {}
        self._set((*RUN, tuple(run.items())), 1)

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Take new values. Those of a phase that is over go, but what stays true of it."""
        if phase != self._phase:
            self._forget(self._phase)
            self._phase = phase
        for key, value in {"step": step, **numbers(values)}.items():
            self._set(sample(phase, key), value)

    def text(self) -> str:
        lines = []
        for family, (help, samples) in self._families.items():
            lines += [f"# HELP {PREFIX}{family} {_escaped(help)}", f"# TYPE {PREFIX}{family} gauge"]
            for labels, value in samples.items():
                inside = ",".join(f'{name}="{_escaped(text, quotes=True)}"' for name, text in labels)
                lines.append(f"{PREFIX}{family}{f'{{{inside}}}' if inside else ''} {_number(value)}")
        return "\n".join(lines) + "\n"

    def _set(self, which: Sample, value: float) -> None:
        family, help, labels = which
        self._families.setdefault(family, (help, {}))[1][labels] = value

    def _forget(self, phase: str | None) -> None:
        for family, (_, samples) in list(self._families.items()):
            if family not in LASTING:
                for labels in [each for each in samples if ("phase", phase) in each]:
                    del samples[labels]
                if not samples:
                    del self._families[family]


def _escaped(text: str, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
