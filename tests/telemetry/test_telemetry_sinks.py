"""The record of a run, metrics.jsonl, and the fan-out to sinks that may fail."""

import errno
import io
import json

import pytest

from engine.errors import UserError
from engine.telemetry import sinks
from engine.telemetry.monitor import Monitor
from engine.telemetry.sinks import Lines, Run, cause, numbers


class Kept:
    """A sink that keeps every call, and fails where `fails` names it."""

    name = "kept"

    def __init__(self, *fails: str):
        self.calls, self.fails = [], fails

    def __getattr__(self, method):
        def call(*given):
            self.calls.append((method, *given))
            if method in self.fails:
                raise OSError(errno.EIO, "broken")

        return call


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def monitor(output, *trackers, warn=pytest.fail):
    return Monitor(output, trackers, settings={"lr": 1.0}, say=pytest.fail, warn=warn)


def test_every_sink_gets_everything(tmp_path):
    kept = Kept()
    with monitor(tmp_path, kept) as it:
        it.rewind("kd", 0)
        it.log("kd", 20, {"loss": 0.5})
    (_, run), *calls = kept.calls
    assert (run.output, run.name, run.settings) == (tmp_path, tmp_path.name, {"lr": 1.0})
    assert calls == [("rewind", "kd", 0), ("log", "kd", 20, {"loss": 0.5}), ("close", True)]
    assert records(tmp_path) == [{"phase": "kd", "step": 20, "loss": 0.5}]
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert b"kd/loss" in events.read_bytes()


@pytest.mark.parametrize("call", ["log", "rewind"])
def test_a_sink_that_fails_is_dropped(tmp_path, call):
    """TensorBoard's is one of them."""
    warned, other = [], Kept()
    failing = Kept(call, "close")
    with monitor(tmp_path, failing, other, warn=warned.append) as it:
        if call == "log":
            it._sinks[0]._events.add_scalar = lambda *_: 1 / 0
        for step in (1, 2):
            it.rewind("kd", step - 1)
            it.log("kd", step, {"loss": 1.0})
    end = "and gets nothing more; metrics.jsonl has everything."
    board = [f"TensorBoard failed (ZeroDivisionError: division by zero) {end}"] if call == "log" else []
    assert warned == [*board, f"kept failed (OSError: [Errno 5] broken) {end}"]
    assert [name for name, *_ in failing.calls].count(call) == 1
    assert len(records(tmp_path)) == 2 and len([c for c in other.calls if c[0] == "log"]) == 2


def test_a_sink_that_cannot_start_or_close_and_one_that_hears_of_a_failure(tmp_path):
    """During the run, and where another sink refuses it."""
    warned, kept, second = [], Kept(), Kept()
    with (
        pytest.raises(KeyboardInterrupt),
        monitor(tmp_path, Kept("start"), Kept("close"), kept, warn=warned.append) as it,
    ):
        raise KeyboardInterrupt
    it.close()
    assert [text.split(" (")[0] for text in warned] == ["kept cannot be started", "kept could not be closed"]
    assert [call for call in kept.calls if call[0] == "close"] == [("close", False)]
    second.start = lambda run: (_ for _ in ()).throw(UserError("no account"))
    with pytest.raises(UserError, match="no account"):
        monitor(tmp_path, kept, second)
    assert kept.calls.count(("close", False)) == 2


# metrics.jsonl


def lines(output, content: bytes, warn=pytest.fail):
    (output / "metrics.jsonl").write_bytes(content)
    sink = Lines()
    sink.start(Run(output, warn=warn))
    return sink


GOOD = b"".join(
    json.dumps({"phase": p, "step": s, "loss": 1.5}).encode() + b"\n"
    for p, s in [("a", 2), ("a", 4), ("b", 2), ("b", 4)]
)


def test_rewind_takes_back_the_phase_after_the_step(tmp_path, monkeypatch):
    """And writes nothing where there is nothing to take back."""
    sink = lines(tmp_path, GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(sinks, "_replace", pytest.fail)
        sink.rewind("b", 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == GOOD
    sink.rewind("b", 2)
    sink.log("b", 3, {})
    sink.close(True)
    assert [(r["phase"], r["step"]) for r in records(tmp_path)] == [("a", 2), ("a", 4), ("b", 2), ("b", 3)]


BROKEN = {
    "not JSON": b'{"phase": "b", "st\n',
    "zeros of a power failure": bytes(100) + b"\n",
    "not UTF-8": b'{"phase": "\xff", "step": 1}\n',
    "no object": b"[1]\n",
    "no phase": b'{"step": 3}\n',
    "no step": b'{"phase": "b"}\n',
    "a step that is none": b'{"phase": "b", "step": "x"}\n',
    "empty": b"\n",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_left_out_with_one_warning(tmp_path, broken):
    """And a last one cut short, also where what is there of it is JSON: its number may have had more digits."""
    whole = GOOD.splitlines(keepends=True)
    for cut in (b"", b'{"phase": "b", "step": 6, "lo', b'{"phase": "b", "step": 6}'):
        warned = []
        sink = lines(tmp_path, b"".join([*whole[:2], broken, *whole[2:], cut]), warned.append)
        sink.rewind("a", 100)
        sink.rewind("b", 100)
        sink.close(True)
        assert (tmp_path / "metrics.jsonl").read_bytes() == GOOD
        (said,) = warned
        assert ("had 2 lines that are not whole" if cut else "had a line that is not whole") in said


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_rewind_that_fails_loses_nothing(tmp_path, monkeypatch):
    sink = lines(tmp_path, GOOD)
    monkeypatch.setattr(sinks.os, "replace", full)
    with pytest.raises(UserError, match="cannot be written"):
        sink.rewind("b", 2)
    sink.close(True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == GOOD


def test_a_full_disk_ends_the_run(tmp_path):
    class Full(io.FileIO):
        write = full

    it = monitor(tmp_path)
    it._lines._lines.close()
    it._lines._lines = io.BufferedWriter(Full(tmp_path / "metrics.jsonl", "ab"))
    said = r"metrics.jsonl cannot be written \(No space left on device\); .* --resume.$"
    with pytest.raises(UserError, match=said), it:
        it.log("kd", 1, {"loss": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(Is a directory\)"):
        monitor(tmp_path)


# What sinks share


def test_what_is_remembered_of_trackers(tmp_path):
    run = Run(tmp_path)
    assert run.remembered("wandb") is None
    run.remember("wandb", "a")
    run.remember("mlflow", "b")
    assert [Run(tmp_path).remembered(name) for name in ("wandb", "mlflow", "trackio")] == ["a", "b", None]
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(UserError, match="trackers.json cannot be read .* delete it"):
        run.remembered("wandb")


def test_numbers_and_causes():
    assert numbers({"a": 1, "b": 0.5, "c": "x", "d": True, "e": None, "f": [1]}) == {"a": 1, "b": 0.5}
    assert cause(ValueError("one.\ntwo")) == "ValueError: one"
    assert cause(ValueError()) == "ValueError"
    assert len(cause(ValueError("x" * 1000))) == 200
