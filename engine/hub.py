"""The one place that decides whether the hub can be used; everything else asks here."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import huggingface_hub
from huggingface_hub import constants

from engine.errors import UserError

_answers: dict[str, str | None] = {}
"""What each endpoint answered in this process: None if it can be used, else the reason why not."""
_lock = threading.Lock()


class Hub:
    """Whether named models and data may come from the hub, and if not, why.

    "hub" is strict (what cannot be had from the hub or its cache is an error), "auto" lets the caller fall back on the
    embedded demonstration, "embedded" never asks.
    """

    def __init__(self, source: Literal["auto", "hub", "embedded"] = "auto", timeout: float = 5.0):
        if source not in ("auto", "hub", "embedded"):
            raise UserError(f"--source is {source!r}; it must be auto, hub or embedded.")
        self.source = source
        self.timeout = timeout
        self.why: str | None = None  # a short reason once `reachable` has said no

    @property
    def strict(self) -> bool:
        return self.source == "hub"

    def reachable(self) -> bool:
        """Does the hub answer? Asks it once per process and waits `timeout` seconds at most, DNS included."""
        if self.source == "embedded":
            self.why = "--source embedded was given"
        elif _offline_is_set():
            self.why = "HF_HUB_OFFLINE is set"
        else:
            endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
            with _lock:
                if endpoint not in _answers:
                    _answers[endpoint] = _ask_in_time(endpoint, self.timeout)
                self.why = _answers[endpoint]
        return self.why is None

    def error(self, what: str, remedy: str) -> UserError:
        """The error for something that only an unreachable hub has. `what` begins the sentence."""
        return UserError(f"{what} cannot be loaded: the hub cannot be reached ({self.why}); {remedy}.")

    @contextmanager
    def offline(self) -> Iterator[None]:
        """Load from the cache only. Without it, the hub's libraries retry a dead network for more than 20 seconds."""
        import datasets

        switches = [(constants, constants.HF_HUB_OFFLINE), (datasets.config, datasets.config.HF_HUB_OFFLINE)]
        try:
            for module, _ in switches:
                module.HF_HUB_OFFLINE = True
            yield
        finally:
            for module, before in switches:
                module.HF_HUB_OFFLINE = before


def _offline_is_set() -> bool:
    # the environment is read again here because the library reads it only once, when it is imported
    given = os.environ.get("HF_HUB_OFFLINE", "").strip().upper()
    return given in ("1", "ON", "YES", "TRUE") or constants.HF_HUB_OFFLINE


def _ask_in_time(endpoint: str, timeout: float) -> str | None:
    """`_ask` with a limit on the whole request: a client's own timeouts count each phase, and none covers DNS."""
    answer: list[str | None] = []
    # a daemon, so that a lookup that hangs does not keep the process alive either
    thread = threading.Thread(target=lambda: answer.append(_ask(endpoint, timeout)), daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0] if answer else f"no answer within {timeout:g} s"


def _ask(endpoint: str, timeout: float) -> str | None:
    """None if the endpoint answers like a hub, else the reason why it cannot be used."""
    try:
        status = huggingface_hub.get_session().head(endpoint, timeout=timeout).status_code
    except Exception as error:  # noqa: BLE001  the HTTP client, and its exceptions, change between versions of the hub library
        return _reason(error)
    # 403, 407 and 451 come from proxies that let nothing through, 5xx from a hub that is down
    return f"it answered with status {status}" if status in (403, 407, 451) or status >= 500 else None


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    low = text.lower()
    if any(part in low for part in ("name resolution", "not known", "getaddrinfo", "no address associated")):
        return "name resolution failed"
    if "refused" in low:
        return "connection refused"
    if "timed out" in low or "timeout" in type(error).__name__.lower():
        return "the connection timed out"
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
