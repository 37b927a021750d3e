"""An interruption costs nothing: kills, signals, and what --resume accepts."""

import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from run_helpers import (
    ROOT,
    assert_as_if_nothing_had_happened,
    assert_same_models,
    contents,
    flags,
    job,
    run_signalled,
    stop,
    succeed,
)

from engine.run import inputs
from engine.run.stages import Stages


def test_a_finished_run_says_so(finished, capsys):
    before = contents(finished)
    assert job(["--resume", "--output", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and str(finished / "summary.json") in out
    assert contents(finished) == before


# In this process


# What a log line's means are of begins before the checkpoint and ends behind it
SHORT = {"max_steps": 6, "log_steps": 4, "checkpoint_steps": 2, "teachers": "bert,roberta", "eval_steps": 5,
         "pilot_steps": 2}  # fmt: skip


@pytest.fixture(scope="module")
def short(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    return succeed(data, folder / "run", cache_dir=folder / "cache", **SHORT)


def test_interruptions_cost_nothing(data, tmp_path, short, monkeypatch, capsys):
    """As after a kill, and stopped, when the last checkpoint is some steps old; other data in between are refused."""
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    copy, run = tmp_path / "d.tsv", tmp_path / "run"
    copy.write_bytes(Path(data).read_bytes())
    resume = ["--resume", "--output", str(run)]
    assert stop(flags(copy, run, **SHORT), "prepare roberta", 3) == -signal.SIGKILL
    copy.write_text(copy.read_text().replace("The", "A"))
    assert job(resume) == 2
    assert "other models or data" in capsys.readouterr().err
    copy.write_bytes(Path(data).read_bytes())
    assert stop(resume, "metadistil", 3, signal.SIGINT) == 128 + signal.SIGINT
    said = capsys.readouterr().out
    assert "Resuming 'prepare roberta' after step" in said and not (run / "summary.json").exists()
    assert "Stopped by SIGINT; the checkpoint is saved. Resume with: " in said
    assert job(resume) == 0
    assert "Resuming 'metadistil' after step" in capsys.readouterr().out
    assert_as_if_nothing_had_happened(run, short)


def test_a_stop_before_there_is_anything_leaves_nothing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "load_splits", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert job(flags(data, tmp_path / "run")) == 128 + signal.SIGTERM
    assert capsys.readouterr().out.splitlines()[-1] == "Stopped by SIGTERM; nothing was written."
    assert not (tmp_path / "run").exists()


def test_a_stop_before_the_first_checkpoint_says_so(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Stages, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert job(flags(data, tmp_path / "run")) == 128 + signal.SIGTERM
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("Stopped by SIGTERM before the first checkpoint. Start again with: ") and "--resume" in said


# In processes of their own


LONG = {"max_steps": 40, "log_steps": 1, "checkpoint_steps": 2, "teachers": "bert,roberta", "eval_steps": 7}
NONE = {"checkpoint_steps": 1000}  # before the end


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """`uninterrupted(...)`: the whole run with these settings. It has a cache of its own, so that a teacher that was half
    prepared is not found there."""

    @cache
    def run(**changes):
        folder = tmp_path_factory.mktemp("whole")
        return succeed(data, folder / "run", cache_dir=folder / "cache", **LONG | changes)

    return run


# Phase and step at which the process gets signals, and settings that differ from LONG
INTERRUPTIONS = {
    "distilling": ("metadistil", 13, [signal.SIGKILL], {}),
    "pilots of two": ("metadistil", 13, [signal.SIGKILL], {"pilot_steps": 2}),
    "preparing the second": ("prepare roberta", 7, [signal.SIGKILL], {"prepare_epochs": 8}),
    "warming up": ("warm up", 7, [signal.SIGKILL], {"student_warmup_epochs": 8}),
    "kd": ("kd", 13, [signal.SIGKILL], {"method": "kd", "max_steps": 120}),
    "lgtm": ("lgtm", 13, [signal.SIGKILL], {"method": "lgtm"}),
    "reptile": ("reptile", 13, [signal.SIGKILL], {"method": "reptile"}),
    "before the first checkpoint": ("metadistil", 5, [signal.SIGKILL], NONE),
    "a second signal does not wait": ("metadistil", 9, [signal.SIGINT, signal.SIGTERM], {}),
    "with the last step": ("metadistil", 40, [signal.SIGTERM], NONE),  # everything is trained and nothing exported
    "the cache is lost": ("metadistil", 13, [signal.SIGKILL], {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interruption_costs_nothing(name, data, tmp_path, uninterrupted, monkeypatch, capsys):
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    (phase, step, numbers, changes), run = INTERRUPTIONS[name], tmp_path / "run"
    whole = uninterrupted(**{key: value for key, value in changes.items() if key not in NONE})
    stopped = run_signalled(flags(data, run, **LONG | changes), phase, step, *numbers)
    killed = numbers[-1] == signal.SIGKILL
    assert stopped.returncode == (-signal.SIGKILL if killed else 143) and "Traceback" not in stopped.stderr
    assert killed or "Resume with: python -m engine.train --resume --output" in stopped.stdout.splitlines()[-1]
    assert not (run / "summary.json").exists()
    if name == "the cache is lost":
        shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    if name == "with the last step":  # no step is logged again
        again = run_signalled(["--resume", "--output", str(run)], phase, 1, signal.SIGKILL)
        assert again.returncode == 0, again.stderr
    else:
        assert job(["--resume", "--output", str(run)]) == 0
        assert (f"Resuming '{phase}' after step" in capsys.readouterr().out) == (changes != NONE)
    assert_same_models(run, whole)
    if name != "the cache is lost":  # whose teachers are prepared, and logged, again
        assert_as_if_nothing_had_happened(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_and_resume_with_the_printed_command(number, data, tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "a run's output"  # a name that a shell has to be told about
    stopped = run_signalled(flags(data, run, **LONG | NONE), "metadistil", 5, number)
    assert stopped.returncode == 128 + number
    assert "Traceback" not in stopped.stderr
    last = stopped.stdout.strip().splitlines()[-1]
    assert last.startswith(f"Stopped by {number.name}; the checkpoint is saved. Resume with: ")
    command = last.split("Resume with: ")[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, cwd=ROOT, env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_as_if_nothing_had_happened(run, uninterrupted())
