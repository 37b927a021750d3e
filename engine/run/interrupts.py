"""Ctrl-C, SIGTERM and a lost terminal: a training loop finishes its step and saves; everything else stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress


class Interrupted(BaseException):
    """The run was asked to stop. `status` is the exit status a shell expects: 128 + the signal's number.

    Like KeyboardInterrupt it is no Exception, so that no `except Exception` swallows it.
    """

    def __init__(self, number: int, saved: bool = False):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number
        self.saved = saved  # whether a checkpoint holds the work


class Interrupts:
    """Handles the signals while it is entered. A second one does not wait for the step."""

    def __init__(self, say: Callable[[str], None] = lambda message: None):
        self.say = say
        self.requested: int | None = None
        self.deferring = False  # set by the loop: it checks `requested` after each step
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and so do we then
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if not self.deferring or self.requested is not None:
            raise Interrupted(number)
        self.requested = number
        with suppress(RuntimeError):  # it may have come in the middle of another write, which cannot be entered again
            self.say("Stopping after this step, with a checkpoint; a second signal stops at once.")
