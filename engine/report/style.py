"""The one look of everything that is drawn: colours for light and dark, line styles, matplotlib's settings."""

from __future__ import annotations

import matplotlib.style

# name: (light, dark). Light values are all different: a drawing is made in them, and `engine.report.svg` writes each as the
# variable of its name. Text keeps 4.5:1 to its background in both, lines 3:1 (WCAG 2.2, 1.4.3 and 1.4.11).
PALETTE = {
    "page": ("#ffffff", "#12161b"),
    "box": ("#f5f7f9", "#1b2128"),
    "text": ("#1b2026", "#e7eaee"),
    "muted": ("#57606b", "#a3adb8"),
    "rule": ("#d5dbe1", "#343c46"),
    "link": ("#0a5bb5", "#86b9f7"),
    "bar": ("#b9d3ec", "#2f4f70"),
    "warn": ("#8a4b00", "#f0b45f"),
    "warn-box": ("#fff5e5", "#2b2314"),
    "ours": ("#1f4e79", "#8fc0ee"),
    "points": ("#7fa8d1", "#5d86ad"),
    "published": ("#c0504d", "#f08c86"),
    "series-1": ("#1a5fa6", "#6cb2ff"),
    "series-2": ("#b4530a", "#f2a65e"),
    "series-3": ("#1b7a45", "#5ecb8c"),
    "series-4": ("#8b3f9f", "#d79ae9"),
    "series-5": ("#a8324b", "#ff91a4"),
    "series-6": ("#0b7284", "#58c6da"),
    "series-7": ("#6b5c00", "#d8c54d"),
    "series-8": ("#4a5564", "#b3bcc8"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
SERIES = [name for name in PALETTE if name.startswith("series-")]
DASHES = ((), (5.0, 2.0), (1.5, 1.5), (6.0, 1.5, 1.5, 1.5))  # lengths on and off, in points

SETTINGS = {
    "font.size": 8.5, "axes.labelsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "text.color": LIGHT["text"], "axes.labelcolor": LIGHT["muted"], "axes.edgecolor": LIGHT["muted"],
    "xtick.color": LIGHT["muted"], "ytick.color": LIGHT["muted"], "grid.color": LIGHT["rule"], "grid.linewidth": 0.7,
    "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7, "ytick.major.size": 0.0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "text.parse_math": False,  # labels are names: a dollar sign is one
    "svg.hashsalt": "metadistil",  # the same drawing has the same bytes
}  # fmt: skip


def series(index: int) -> tuple[str, tuple[float, ...]]:
    """Name of the colour, and the dashes, of the line of this number; different for 32 of them."""
    return SERIES[index % len(SERIES)], DASHES[index // len(SERIES) % len(DASHES)]


def settled(**changes):
    """A context in which matplotlib has these settings, whatever a matplotlibrc says."""
    return matplotlib.style.context(["default", SETTINGS | changes])
