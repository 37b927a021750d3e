"""What a person sees: messages, a banner nobody can miss, live progress on a terminal and plain lines elsewhere."""

from __future__ import annotations

import time
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 15  # without a terminal, at most one progress line in this many seconds


class Console:
    """Writes to standard output; `Console(width=...)` fixes the width in tests."""

    def __init__(self, **options):
        self.rich = RichConsole(highlight=False, soft_wrap=True, **options)

    def say(self, message: str) -> None:
        self.rich.print(escape(message))

    def warn(self, message: str) -> None:
        self.rich.print(f"[yellow]warning:[/] {escape(message)}")

    def banner(self, title: str, message: str) -> None:
        self.rich.print(
            Panel(escape(message), title=f"[bold]{escape(title)}[/]", border_style="yellow", padding=(1, 2)),
            soft_wrap=False,
        )

    def table(self, columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
        table = Table(title=title)
        for i, column in enumerate(columns):
            text = i < 2
            table.add_column(column, justify="left" if text else "right", overflow="fold", no_wrap=not text)
        for row in rows:
            table.add_row(*map(escape, row))
        self.rich.print(table, soft_wrap=False)

    @contextmanager
    def progress(self, phase: str, total: int, done: int = 0):
        """Yields `advance(step, text)`; `text` is what is shown with the bar."""
        if self.rich.is_terminal:
            with _TwoLines(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("left"), console=self.rich,
            ) as bar:  # fmt: skip
                task = bar.add_task(escape(phase), total=total, completed=done, text="")
                yield lambda step, text: bar.update(task, completed=step, text=text)
        else:
            yield _PlainProgress(self, phase, total, done)


class _TwoLines(Progress):
    """The text below the bar: beside it, in 80 columns, it would squeeze out the step and the time that is left."""

    def get_renderables(self):
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(f"  {task.fields['text']}", no_wrap=True, overflow="ellipsis")


class _PlainProgress:
    def __init__(self, console: Console, phase: str, total: int, done: int):
        self.console, self.phase, self.total, self.first = console, phase, total, done
        self.start = self.last = time.monotonic()

    def __call__(self, step: int, text: str) -> None:
        now = time.monotonic()
        if now - self.last >= PLAIN_SECONDS or step >= self.total:
            self.last = now
            rate = (step - self.first) / max(1e-9, now - self.start)
            left = (self.total - step) / max(1e-9, rate)
            parts = [f"{self.phase}: step {step}/{self.total}", text, f"{left:.0f} s left"]
            self.console.say(", ".join(part for part in parts if part))
