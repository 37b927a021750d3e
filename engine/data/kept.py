"""The names of what runs keep for later ones: each is a hash of all that it depends on, this program's numbers among it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Raised by every commit after which equal settings and inputs give other numbers anywhere (CONTRIBUTING.md). What was kept by
# a program of other numbers is then not found, and is made again.
NUMBERS = 2


def key(**settings: Any) -> str:
    """24 hex digits that name what `settings`, which are JSON, determine as long as this program computes the same."""
    known = {"numbers": NUMBERS, "settings": settings}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]
