"""Which section of a step is running: the code names its sections, whoever measures listens.

    with section("quiz"):
        ...

Sections nest, and time belongs to the innermost one. With nobody listening a section costs 0.2 microseconds. Only
the thread that trains names sections.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator, contextmanager
from typing import Protocol

# In the order of a round, which is that of tables. "other" is what a step does outside of all of them.
SECTIONS = (
    "data wait", "teacher forward", "pilot", "quiz", "rewind", "JVP", "teacher update", "real step", "optimizer", "logging",
    "evaluation", "checkpoint", "other",
)  # fmt: skip


class Listener(Protocol):
    def enter(self, name: str) -> None: ...

    def leave(self) -> None:
        """Out of the section that was entered last, back into the one around it."""

    def captured(self) -> Callable[[], None]:
        """The sections since a CUDA graph's capture began are part of the graph: what to call after each replay."""


_listeners: tuple[Listener, ...] = ()


class section(ContextDecorator):
    """Everything in the body, or in the function that it decorates, is section `name`, but what a section inside of it names."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        for listener in _listeners:
            listener.enter(self.name)

    def __exit__(self, *_) -> None:
        for listener in _listeners:
            listener.leave()


def captured() -> Callable[[], None]:
    """To be called when sections were recorded in a CUDA graph; the result after each replay, in which no code runs."""
    heard = [listener.captured() for listener in _listeners]

    def replayed() -> None:
        for each in heard:
            each()

    return replayed


@contextmanager
def listening(listener: Listener):
    """`listener` hears of every section that is entered in the body; it must begin and end outside of all sections."""
    global _listeners
    _listeners += (listener,)
    try:
        yield listener
    finally:
        _listeners = tuple(each for each in _listeners if each is not listener)
