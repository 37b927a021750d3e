"""The Prometheus family and labels of each figure.

The flat keys of `metrics.jsonl` become families with labels: "seconds/pilot" of the phase "metadistil" is
`metadistil_seconds{phase="metadistil",section="pilot"}`. A family's unit is the last word of its name where it has one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PREFIX = "metadistil_"

# Key -> family and help of a figure that belongs to a phase.
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
# Key -> family and help of a figure of the machine, which has no phase.
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
# What stands before a key's slash -> family, the label that takes what stands behind it, and help.
GROUPS = {
    "seconds": ("seconds", "section", "Mean seconds that a step spends in a section of it."),
    "memory": ("memory_bytes", "section", "Peak memory in a section of the step."),
    "joules": ("joules", "section", "Energy that a step takes in a section of it."),
    "lr": ("teacher_learning_rate", "teacher", "Learning rate of a teacher that learns with its student."),
    "drift": ("drift", "teacher", "How far a teacher's weights are from where they began, relative to their norm."),
    "below_eps": (
        "below_eps",
        "teacher",
        "Share of a teacher's meta-gradient, where it is not 0, below its optimizer's eps.",
    ),
    "validation": ("validation", "metric", "A metric on the validation set."),
}
WEIGHT = ("teacher_weight", "Weight of a teacher in the mean of logits, counted from 1.")
OTHER = ("value", "A figure of the run that has no family of its own.")
LASTING = ("step", "epoch", "validation", "drift")  # families whose values stay true of a phase when it is over


class Sample(NamedTuple):
    """What a value is called. `family` is without the prefix; `labels` are pairs of name and text."""

    family: str
    help: str
    labels: tuple[tuple[str, str], ...]


def sample(phase: str, key: str) -> Sample:
    """The sample of a flat key; different keys never share family and labels."""
    if key in MACHINE:
        return Sample(*MACHINE[key], ())
    labels = (("phase", phase),)
    if key in SINGLE:
        return Sample(*SINGLE[key], labels)
    group, slash, rest = key.partition("/")
    if slash and group in GROUPS:
        family, label, help = GROUPS[group]
        return Sample(family, help, (*labels, (label, rest)))
    if number := re.fullmatch(r"weight_([1-9][0-9]*)", key):
        return Sample(*WEIGHT, (*labels, ("teacher", number[1])))
    if re.fullmatch(r"([a-z][a-z0-9]*_)?loss", key):
        return Sample(key, f"Mean {key.replace('_', ' ')} since figures were logged before.", labels)
    return Sample(*OTHER, (*labels, ("name", key)))
