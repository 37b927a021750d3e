"""What a person sees: live lines that fit their terminal, one line now and then elsewhere, and nothing that gets stuck."""

import io
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console as RichConsole

from engine.screen import console as console_module
from engine.screen import live
from engine.screen.console import Console
from engine.screen.live import Display, Pace, line

ROOT = Path(__file__).parents[2]
RECORD = {
    "time": 1.7e9, "epoch": 1.5, "loss": 0.31254, "pilot_loss": 0.33, "quiz_loss": 0.29, "teacher_loss": 0.44, "lr": 4.2e-5,
    "lr/bert": 1e-5, "examples_per_second": 1234.4, "tokens_per_second": 38100.2, "flops_per_second": 1.234e12,
    "step_seconds": 0.02, "seconds/pilot": 0.01, "memory/pilot": 3e9, "host/resident": 2 * 2**30, "host/cpu": 180.0,
    "joules_per_step": 8.0, "validation/accuracy": 0.9,
}  # fmt: skip
DEVICE = {"device/memory_used": 60 * 2**30, "device/memory_total": 80 * 2**30, "device/power": 312.4,
          "joules_per_example": 0.25342}  # fmt: skip


@pytest.fixture(autouse=True)
def memory_of_the_host(monkeypatch):
    monkeypatch.setattr(live, "host_memory", lambda: 16 * 2**30)


def drawn(display: Display, width: int, **options) -> list[str]:
    console = RichConsole(file=io.StringIO(), width=width, soft_wrap=True, force_terminal=True, **options)
    console.print(display, end="")
    return console.file.getvalue().splitlines()


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def display(step=300, total=1200, values=None, phase="metadistil") -> Display:
    it = Display(phase, total, 0)
    it._begun -= 10
    it._pace = Pace(total, 0, time.monotonic() - 10)
    it(step, RECORD if values is None else values)
    return it


def test_eighty_columns():
    head, *rest = drawn(display(), 80, no_color=True)
    assert re.fullmatch(r"metadistil  (━+╸?)\s+300/1200  0:00:30 left\s*", bare(head))
    assert 8 <= head.count("━") <= 11  # a quarter of 40 columns
    assert [line.rstrip() for line in map(bare, rest)] == [
        "  loss 0.3125   pilot loss 0.3300   quiz loss 0.2900   teacher loss 0.4400",
        "  lr 4.20e-05   1,234 examples/s   38,100 tokens/s   1.23 TFLOP/s",
        "  memory  ━━                2.0 of 16.0 GiB",
    ]


def test_devices():
    """One that tells everything, and one without NVML."""
    lines = drawn(display(values=RECORD | DEVICE), 120, no_color=True)
    assert " ".join(bare(lines[-1]).split()) == f"memory {'━' * 12} 60.0 of 80.0 GiB 312 W 0.253 J/example"
    assert len(lines) == 4
    values = {"loss": 1.0, "memory/reserved": 3 * 2**30, "host/resident": 2**30}
    assert bare(drawn(display(values=values), 80)[-1]).split() == ["memory", "3.0", "GiB"]


def test_the_first_and_the_last_step():
    (only,) = drawn(Display("metadistil", 100, 0), 80, no_color=True)
    assert bare(only).rstrip().endswith("0/100  -:--:-- left")
    assert "1200/1200  in 0:00:10" in bare(drawn(display(step=1200), 80)[0])


@pytest.mark.parametrize("width", [1, 10, 20, 33, 40, 60, 79, 80, 81, 120, 300])
@pytest.mark.parametrize("phase", ["prepare " + "long-name" * 20, "prepare 日本語のモデル" * 9, "[bold]odd"])
def test_no_line_is_wider_than_the_terminal(width, phase):
    """A line that the terminal wraps cannot be drawn over, and the display would scroll."""
    many = RECORD | {f"weight_{i}": 0.1 for i in range(9)} | {"loss": float("nan"), "pilot_loss": 1e30}
    for values in ({}, RECORD, many, many | DEVICE):
        lines = drawn(display(values=values, phase=phase), width)
        assert all(cell_len(bare(line)) <= width for line in lines), [bare(line) for line in lines]


def test_all_figures_are_there_in_narrow_terminals():
    values = RECORD | {f"weight_{i}": 0.125 for i in range(4)}
    figures = [f"weight {i} 0.1250" for i in range(4)]
    figures += ["teacher loss 0.4400", "1,234 examples/s", "1.23 TFLOP/s", "4.20e-05", "2.0 of 16.0 GiB"]
    for width in (40, 80, 120):
        text = "\n".join(map(bare, drawn(display(values=values), width)))
        for figure in figures:
            assert figure in text, (width, figure)


def test_colours_and_none(monkeypatch):
    colour = r"\x1b\[[0-9;]*(?<![0-9])(3[0-7]|38|9[0-7])[;m]"
    assert re.search(colour, "".join(drawn(display(), 80, color_system="256")))
    monkeypatch.setenv("NO_COLOR", "1")
    plain = "".join(drawn(display(), 80, color_system="256"))
    assert not re.search(colour, plain)
    assert "loss 0.3125" in bare(plain)


def test_time_left_is_of_the_last_minute():
    pace = Pace(1000, 0, 0.0)
    assert pace.left(0, 0.0) is None
    assert pace.left(10, 10.0) == pytest.approx(990)
    for second in range(11, 200):
        left = pace.left(10 + (second - 10) * 2, float(second))
    assert left == pytest.approx((1000 - 388) / 2)
    assert len(pace._seen) < 70
    resumed = Pace(1000, 900, 0.0)
    assert resumed.left(910, 10.0) == pytest.approx(90)


def test_the_line_of_text():
    assert line(RECORD | DEVICE, 2**34) == (
        "loss 0.3125, pilot loss 0.3300, quiz loss 0.2900, teacher loss 0.4400, lr 4.20e-05, 1,234 examples/s, "
        "38,100 tokens/s, 1.23 TFLOP/s, memory 60.0 of 80.0 GiB, 312 W, 0.253 J/example")  # fmt: skip
    assert line({}, None) == ""
    assert line({"host/resident": 2**30}, None) == "memory 1.0 GiB"


def test_without_a_terminal_there_are_few_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=400)
    with console.progress("metadistil", 100, 20) as show:
        for step in range(21, 101):
            now[0] += 1
            show(step, {"loss": 0.5, "examples_per_second": 12.3, "host/resident": 2**31} if step >= 30 else {})
    printed = console.rich.file.getvalue().splitlines()
    assert printed[0] == "metadistil: step 35/100, loss 0.5000, 12 examples/s, memory 2.0 of 16.0 GiB, 65 s left"
    assert [text.split("step ")[1].split("/")[0] for text in printed] == ["35", "50", "65", "80", "95", "100"]
    assert printed[-1].endswith(", 0 s left")


def test_a_dumb_terminal_is_none_and_warnings_are_kept(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True, width=80, no_color=True)
    with console.progress("kd", 2) as show:
        show(2, {"loss": 1.0})
    console.warn("[one] thing")
    assert console.warnings == ["[one] thing"]
    progress, warning = console.rich.file.getvalue().splitlines()
    assert progress.startswith("kd: step 2/2, loss 1.0000") and bare(warning) == "warning: [one] thing"


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.undo()
    whole = live.host_memory()
    assert whole > 2**20
    (tmp_path / "limit").write_text("1048576\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(live, "CGROUP_LIMITS", (str(tmp_path / "missing"), str(tmp_path / "none")))
    assert live.host_memory() >= whole
    monkeypatch.setattr(live, "CGROUP_LIMITS", (str(tmp_path / "none"), str(tmp_path / "limit")))
    assert live.host_memory() == 2**20


# On a terminal

TRAINING = """
import sys, time
from engine.screen.console import Console
from engine.run.interrupts import Interrupted, Interrupts
console = Console()
try:
    with Interrupts(console.say), console.progress("metadistil", 10**6) as show:
        for step in range(1, 10**6):
            show(step, {"loss": 0.5, "lr": 1e-5} if step > 3 else {})
            if step == 20:
                console.say("a message")
            time.sleep(0.01)
except Interrupted as stop:
    console.say(f"stopped by {stop}")
    sys.exit(stop.status)
"""


def test_ctrl_c_leaves_the_terminal_sane():
    """In a real (pseudo) terminal: the cursor is shown again, and lines are drawn over, not scrolled."""
    host, guest = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen([sys.executable, "-c", TRAINING], cwd=ROOT, env=environment, stdin=guest, stdout=guest,
                               stderr=guest)  # fmt: skip
    os.close(guest)
    seen, shown = b"", None
    with suppress(OSError):  # the other end is closed
        while chunk := os.read(host, 4096):
            seen += chunk
            if shown is None and "loss 0.5000" in bare(seen.decode(errors="ignore")):
                shown = time.monotonic(), len(seen)
            if shown is not None and time.monotonic() - shown[0] >= 0.5:
                process.send_signal(signal.SIGINT)
                bytes_a_second, shown = 2 * (len(seen) - shown[1]), (math.inf, 0)
    assert process.wait(30) == 130
    os.close(host)
    text = seen.decode()
    assert "stopped by SIGINT" in text and text.count("a message") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor, shown after it was hidden
    assert "Traceback" not in text and "\x1b[2J" not in text  # nor was the screen cleared
    assert 0 < bytes_a_second < 20_000
    redrawn = bare(text).count("metadistil  ")
    assert 3 <= redrawn <= 4 * 70 and text.count("\x1b[1A") >= redrawn - 2  # the cursor goes up to draw it again
