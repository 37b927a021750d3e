"""Stands in for engine.train where a test is about what runs the cells: it leaves the same files, in no time.

A learning rate of 0.5 is refused, 0.25 kills the process, 0.125 waits for a signal (0.0625 for a second one), and ends well
when it is resumed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

DEFAULTS = {"method": "metadistil", "teachers": "bert", "student": "distilbert", "lr": 1e-3}


def summary(settings: dict) -> dict:
    names = [] if settings["method"] == "finetune" else settings["teachers"].split(",")
    seed, bonus = settings["seed"], {"finetune": 0.0, "kd": 0.01}.get(settings["method"], 0.02)
    figure = 0.8 + bonus + 0.001 * seed * (1 + len(names)) + 0.1 * (settings.get("target_domain") == "books")
    metrics = {split: {"accuracy": figure, "f1": 0.5} for split in ("validation", "test")}
    teachers = [{"name": name, "parameters": 300, "metrics": {s: {"accuracy": 0.9 + 0.01 * i} for s in metrics},
                 "prepared": {"seconds": 7.0}} for i, name in enumerate(names)]  # fmt: skip
    return {
        "method": settings["method"], "metric": "accuracy", "source": "local", "teachers": teachers, "seed": seed,
        "student": {"name": settings["student"], "parameters": 100, "metrics": metrics},
        "times_smaller": 3.0 if names else None, "examples_per_second": 50.0,
        "phases": {"prepare bert": {"seconds": 7.0}, "warm up": {"seconds": 1.0}, settings["method"]: {"seconds": 2.0}},
        "peak_memory": {"host": 2**30}, "sizes": {"train": 32 if len(names) > 1 else 64, "test": 12}, "git_commit": "abcdef0123",
        "device": {"device": "cpu", "name": "a processor", "threads": 1},
        "versions": {"torch": "1", "transformers": "2", "python": "3"},
    }  # fmt: skip


def main(words: list[str]) -> int:
    given = dict(zip(words[::2], words[1::2], strict=True)) if "--resume" not in words else {"--output": words[-1]}
    folder = Path(given["--output"])
    resumed = "--config" not in given
    settings = DEFAULTS | yaml.safe_load(Path(given.get("--config", folder / "config.yaml")).read_text())
    lr = float(settings["lr"])
    if lr == 0.5:
        print("a line\nerror: --lr is 0.5; it must be smaller.\nlast words")
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with open(folder / "starts", "a") as starts:
        starts.write("resumed\n" if resumed else "started\n")
    if lr == 0.25:
        os.kill(os.getpid(), signal.SIGKILL)
    if lr in (0.125, 0.0625) and not resumed:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if lr == 0.125 else (folder / "noted").touch())
        (folder / "waiting").touch()
        for _ in range(200):
            time.sleep(0.1)
    (folder / "summary.json").write_text(json.dumps(summary(settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
