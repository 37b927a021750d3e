"""What a person sees: messages, a banner nobody can miss, live progress on a terminal and plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from engine.screen import live

PLAIN_SECONDS = 15  # without a terminal, at most one progress line in this many seconds


class Console:
    """Writes to standard output; `Console(width=...)` fixes the width in tests."""

    def __init__(self, **options):
        self.rich = RichConsole(highlight=False, soft_wrap=True, **options)
        self.warnings: list[str] = []  # all of them, for the report of the run

    def say(self, message: str) -> None:
        self.rich.print(escape(message))

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.rich.print(f"[yellow]warning:[/] {escape(message)}")

    def banner(self, title: str, message: str) -> None:
        self.rich.print(
            Panel(escape(message), title=f"[bold]{escape(title)}[/]", border_style="yellow", padding=(1, 2)),
            soft_wrap=False,
        )

    def table(self, columns: list[str], rows: list[list[str]], title: str | None = None, words: int = 2) -> None:
        """The first `words` columns are words, the others figures."""
        table = Table(title=title)
        for i, column in enumerate(columns):
            text = i < words
            # a header may be broken at its spaces, a figure may not
            least = None if text else max((len(row[i]) for row in rows), default=0)
            table.add_column(column, justify="left" if text else "right", overflow="fold", min_width=least)
        for row in rows:
            table.add_row(*map(escape, row))
        self.rich.print(table, soft_wrap=False)

    @contextmanager
    def progress(self, phase: str, total: int, done: int = 0):
        """Yields `show(step, values)`, cheap enough for every step; `values` is the newest record, {} before the first."""
        if self.rich.is_terminal and not self.rich.is_dumb_terminal:
            display = live.Display(phase, total, done)
            with Live(display, console=self.rich, refresh_per_second=live.REDRAWN):
                yield display
        else:
            yield _PlainProgress(self, phase, total, done)


class _PlainProgress:
    def __init__(self, console: Console, phase: str, total: int, done: int):
        self.console, self.phase, self.total, self.first = console, phase, total, done
        self.start = self.last = time.monotonic()
        self.of_host = live.host_memory()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self.last >= PLAIN_SECONDS or step >= self.total:
            self.last = now
            rate = (step - self.first) / max(1e-9, now - self.start)
            left = (self.total - step) / max(1e-9, rate)
            parts = [f"{self.phase}: step {step}/{self.total}", live.line(values, self.of_host), f"{left:.0f} s left"]
            self.console.say(", ".join(part for part in parts if part))
