"""Runs that never ran: directories with all that telemetry records, for tests of the page."""

import json
import math
import random
from pathlib import Path

import yaml

from engine.config import Config
from engine.report import pages
from engine.sections import SECTIONS

# seconds a step of each section: MetaDistil with one pilot step on a GPU, roughly; made up all the same
SECONDS = {"data wait": 0.0004, "teacher forward": 0.0311, "pilot": 0.0278, "quiz": 0.0102, "rewind": 0.0006, "JVP": 0.0257,
           "teacher update": 0.0643, "real step": 0.0189, "optimizer": 0.0047, "logging": 0.0003, "evaluation": 0.0081,
           "checkpoint": 0.0022, "other": 0.0009}  # fmt: skip
TEACHERS = ("bert", "roberta")
METRICS = ("accuracy", "f1", "matthews")
GIB = 2**30


def settings(**changes) -> dict:
    found = Config().to_flat() | {
        "teachers": ",".join(TEACHERS), "student": "distilbert", "temperature": 5.0, "alpha": 0.5, "feature_loss": "none",
        "pilot_lr": 6e-5, "lr": 6e-5, "teacher_lr": 1e-5, "epochs": 3, "train_size": 8000, "precision": "bf16", "seed": 3,
        "feature_epochs": 0, "prepare_method": "finetune", "beta": 100.0, "pilot_optimizer": "sgd", "prepare_lr": 6e-5,
        "prepare_epochs": 3, "teacher_seed": 3, "output": None,
    }  # fmt: skip
    return found | changes


def metrics_of(accuracy: float) -> dict[str, float]:
    return {"accuracy": round(accuracy, 6), "f1": round(accuracy - 0.004, 6), "matthews": round(2 * accuracy - 1.01, 6)}


def memory_of(section: str, cuda: bool) -> float:
    return (4.2 + 2.6 * (section in ("quiz", "JVP", "teacher update")) if cuda else 3.1) * GIB


def telemetry_values(step: int, start: float, cuda: bool = True) -> dict[str, float]:
    """What a logging record of the GPU run holds beside the losses."""
    wave = math.sin(step / 60)
    training = {name: s for name, s in SECONDS.items() if name not in ("evaluation", "checkpoint")}
    seconds = {name: s * (1 + 0.03 * wave) for name, s in training.items()}
    total = sum(seconds.values())
    found = {"time": start + 0.2 * step, "step_seconds": total, "tokens_per_second": 32 * 26 / total, "examples_per_second": 32 / total,
             "flops_per_second": 4.1e13}  # fmt: skip
    found |= {f"seconds/{name}": s for name, s in seconds.items()}
    found |= {"host/resident": 3.1 * GIB, "host/cpu": 104 + 3 * wave}
    found |= {f"memory/{name}": memory_of(name, cuda) for name in seconds}
    if not cuda:
        return found
    found |= {f"joules/{name}": 312.0 * s for name, s in seconds.items()}
    return found | {
        "memory/allocated": 4.1 * GIB, "memory/reserved": 7.5 * GIB, "joules_per_step": 312.0 * total, "joules_per_example": 312.0 * total / 32,
        "device/memory_used": 8.9 * GIB, "device/memory_reserved": 0.6 * GIB, "device/memory_total": 80 * GIB, "device/memory_process": 8.2 * GIB,
        "device/utilization": 88 + 6 * wave, "device/memory_utilization": 41 + 4 * wave, "device/sm_clock": 1755 - (60 if step > 500 else 0),
        "device/memory_clock": 2619, "device/temperature": 48 + 14 * (1 - math.exp(-step / 150)), "device/power": 312 + 40 * wave,
        "device/power_limit": 700, "device/energy": 62.4 * step, "device/throttle_reasons": 4 if step > 500 else 0,
        "device/pcie_tx": 2.1e8, "device/pcie_rx": 4.4e8, "device/pcie_generation": 5, "device/pcie_width": 16,
    }  # fmt: skip


def records(steps: int, seed: int, telemetry: bool, cuda: bool, every: int = 5) -> list[dict]:
    dice, found, start = random.Random(seed), [], 1_795_224_000.0
    plan = [("prepare bert", steps, 0.93), ("prepare roberta", steps, 0.94), ("metadistil", steps, 0.915)]
    for phase, length, best in plan:
        for step in range(every, length + 1, every):
            near = math.exp(-4 * step / length)
            loss = 0.18 + 0.52 * near + dice.gauss(0, 0.03)
            record = {"phase": phase, "step": step, "epoch": round(3 * step / length, 4), "loss": loss}
            if phase == "metadistil":
                record |= {"pilot_loss": loss + 0.004, "quiz_loss": 0.24 + 0.4 * near + dice.gauss(0, 0.05)}
                record |= {f"weight_{k + 1}": 0.5 + (0.5 - k) * 0.2 * step / length for k in range(len(TEACHERS))}
                record |= {f"lr/{name}": 1e-5 for name in TEACHERS}
            record |= {"lr": 6e-5, "examples_per_second": 170.0}
            if telemetry:
                record |= telemetry_values(step, start, cuda)
            found.append(record)
            if step % (length // 6) == 0:
                figures = metrics_of(best - 0.12 * near + dice.gauss(0, 0.003))
                validation = {f"validation/{name}": value for name, value in figures.items()}
                if phase == "metadistil":
                    validation |= {
                        f"drift/{name}": 0.004 * math.sqrt(step / length) * (1 + 0.5 * k)
                        for k, name in enumerate(TEACHERS)
                    }
                found.append({"phase": phase, "step": step} | validation)
        start += 0.2 * length
    return found


def summary(steps: int, telemetry: bool, cuda: bool, **changes) -> dict:
    seconds = {name: steps * s for name, s in SECONDS.items()}
    training = sum(s for name, s in seconds.items() if name not in ("evaluation", "checkpoint"))
    names = [*(f"prepare {name}" for name in TEACHERS), "metadistil"]
    teachers = [
        {"name": name, "source": f"google-bert/{name}", "parameters": 109_483_778 + 15_163_392 * i, "origin": "fine-tuned", "sample": 0,
         "metrics": {"validation": metrics_of(0.938 - 0.02 * i), "test": metrics_of(0.936 - 0.02 * i)},
         "prepared": {"validation": metrics_of(0.934 + 0.006 * i), "best_step": 500, "seconds": training}}
        for i, name in enumerate(TEACHERS)
    ]  # fmt: skip
    student = {"name": "distilbert", "source": "distilbert/distilbert-base-uncased", "parameters": 66_955_010, "best_step": 500,
               "metrics": {"validation": metrics_of(0.915), "test": metrics_of(0.9095)}}  # fmt: skip
    memory = {name: memory_of(name, cuda) for name in SECTIONS}
    found = {
        "method": "metadistil", "source": "hub", "sources": {"data": "hub", "student": "hub", "teachers": ["hub", "hub"]},
        "teachers": teachers, "student": student, "times_smaller": 1.7482, "metric": "accuracy", "metrics": student["metrics"],
        "task": {"kind": "classification", "labels": ["negative", "positive"], "pair": False}, "examples_per_second": 32 * steps / training,
        "phases": {name: {"seconds": training, "steps": steps, "skipped": 0, "examples_per_second": 32 * steps / training} for name in names},
        "seconds": 3.4 * training, "padding_waste": 0.0612, "peak_memory": {"host": int(3.3 * GIB)} | ({"device": int(6.9 * GIB)} if cuda else {}),
        "device": {"device": "cuda:0", "name": "NVIDIA H100 80GB HBM3", "threads": 8} if cuda else {"device": "cpu", "name": "AMD EPYC", "threads": 2},
        "sizes": {"train": 8000, "train2": 8000, "quiz": 100, "validation": 872, "test": 2000}, "notes": ["Data (hub): text sentence, label label."],
        "seed": 3, "versions": {"python": "3.11.7", "metadistil-engine": "0.1.0", "torch": "2.13.0+cu130", "transformers": "5.23.0"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567", "settings": settings(),
    }  # fmt: skip
    if telemetry:
        energy = {name: 312.0 * s for name, s in seconds.items()} if cuda else dict.fromkeys(SECTIONS)
        phase = {
            "steps": steps, "seconds": training, "tokens": 32 * 26 * steps, "flops": 4.1e13 * training, "joules": sum(energy.values()) if cuda else None,
            "sections": {name: {"seconds": seconds[name], "memory": memory[name], "joules": energy[name]} for name in SECTIONS},
        }  # fmt: skip
        found |= {
            "warnings": ["teacher roberta fell from accuracy 0.9400 to 0.9180 while it taught; lower --teacher-lr."],
            "command": "python -m engine.train --teachers bert,roberta --student distilbert --precision bf16",
            "telemetry": {
                "cause": None if cuda else "no NVML: libnvidia-ml.so.1 is not installed", "phases": dict.fromkeys(names, phase),
                "device": {"name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-00000000", "mig": False, "driver": "580.65"} if cuda else None,
            },
        }  # fmt: skip
    return found | changes


def make_run(folder: Path, *, steps: int = 750, seed: int = 3, telemetry: bool = True, cuda: bool = True, finished: bool = True,
             lines: int | None = None, config: dict | None = None, **changes) -> Path:  # fmt: skip
    """A run's directory. `lines` of its records only; `config` changes settings, `changes` the summary."""
    folder.mkdir(parents=True)
    chosen = settings(seed=seed, **config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False))
    rows = records(steps, seed, telemetry, cuda)[:lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        content = summary(steps, telemetry, cuda) | {"settings": chosen, "seed": seed} | changes
        (folder / "summary.json").write_text(json.dumps(content, indent=2) + "\n")
    return folder


def page_of(*directories: Path) -> str:
    return pages.write(directories, None)[0].read_text()
