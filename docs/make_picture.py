"""docs/meta-step.svg: one round of the meta-step, as the README shows it.

python -m docs.make_picture    # write the picture

Plain SVG, drawn by hand rather than by matplotlib: text stays text, the file stays small, and the colours, those of the
reports, follow the reader's light or dark setting.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from engine.report.style import PALETTE

PICTURE = Path(__file__).with_name("meta-step.svg")
WIDTH, HEIGHT = 860, 460
CARD = (148, 74)  # width and height of a model's card
TOP, LOW = 72, 304  # its upper edge in either row
FIRST, SECOND, THIRD, FOURTH = 34, 270, 468, 680  # and its left edge
TEACHER, STUDENT, GRADIENT, REWIND, PLAIN = "series-1", "series-3", "series-2", "series-4", "muted"
USED = (TEACHER, STUDENT, GRADIENT, REWIND, PLAIN, "page", "box", "text", "rule")
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Helvetica, Arial, sans-serif"


def picture() -> str:
    """The whole file."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>One round: pilot step, quiz, meta-gradient, rewind, real step</title>",
        f"<style>{style()}</style>",
        "<defs>", *map(head, (TEACHER, STUDENT, GRADIENT, REWIND, PLAIN)), "</defs>",
        rectangle(1, 1, WIDTH - 2, HEIGHT - 2, 14, "page", "rule"),
        *panel(16, 420, "Trial: does this lesson help?"),
        *panel(452, 392, "Lesson: the step that counts"),
        *trial(),
        *lesson(),
        "</svg>\n",
    ])  # fmt: skip


def trial() -> list[str]:
    """The left half: what a lesson would do."""
    return [
        *model(FIRST, TOP, "teachers", "one or several", TEACHER, 5),
        *model(FIRST, LOW, "student", "", STUDENT, 3),
        *model(SECOND, LOW, "student", "on trial", STUDENT, 3, dashed=True),
        *quiz(SECOND, 186),
        arrow("M72 150 V298", PLAIN),
        *label(82, 246, ["averaged", "logits"], PLAIN),
        arrow("M186 341 H264", STUDENT),
        *step(225, 341, 1, ["pilot step"], STUDENT, 0, 29),
        arrow("M344 300 V236", STUDENT),
        *step(344, 267, 2, ["answers"], STUDENT, 18, 4, "start"),
        arrow("M266 208 C200 208 150 200 150 152", GRADIENT, 2.5),
        *step(211, 203, 3, ["meta-gradient", "of the quiz loss"], GRADIENT, 0, 28),
        arrow("M190 109 H460", TEACHER),
        *label(326, 100, ["each teacher takes a step"], TEACHER, "middle"),
    ]


def lesson() -> list[str]:
    """The right half: the step that stays."""
    return [
        *model(THIRD, TOP, "teachers", "after their step", TEACHER, 5),
        *model(THIRD, LOW, "student", "as it was", STUDENT, 3),
        *model(FOURTH, LOW, "student", "taught", STUDENT, 3),
        arrow("M506 150 V298", PLAIN),
        *label(516, 246, ["averaged", "logits"], PLAIN),
        arrow("M344 382 C354 418 532 418 542 384", REWIND, 2, "6 4"),
        *step(443, 409, 4, ["rewind, bit for bit"], REWIND, 0, 27),
        arrow("M620 341 H674", STUDENT),
        *step(647, 341, 5, ["real step"], STUDENT, 0, 29),
        *label(FOURTH, 104, ["Then the next round,", "with these teachers", "and this student."], PLAIN),
    ]


def model(x: int, y: int, name: str, note: str, color: str, layers: int, dashed: bool = False) -> list[str]:
    """A card with as many layers as the model seems deep; teachers are several cards."""
    width, height = CARD
    wide = 30 if layers > 3 else 20
    several = [rectangle(x + 5, y - 5, width, height, 9, "page", color)] if layers > 3 else []
    top = y + height / 2 - (layers * 10 - 4) / 2
    bars = [rectangle(x + 30 - wide / 2, top + 10 * i, wide, 6, 3, color) for i in range(layers)]
    middle = y + height / 2 + 5
    words = [text(x + 56, middle if not note else middle - 8, name, "text", 15, weight=600)]
    if note:
        words.append(text(x + 56, middle + 11, note, PLAIN, 11))
    return [*several, rectangle(x, y, width, height, 9, "page", color, "5 4" if dashed else ""), *bars, *words]


def quiz(x: int, y: int) -> list[str]:
    ticks = [
        f'<path d="M{x + 18} {y + 14 + 11 * i} l4 4 7 -8" class="s-{PLAIN}" fill="none" stroke-width="2"/>'
        for i in (0, 1)
    ]
    return [
        rectangle(x, y, CARD[0], 46, 9, "page", PLAIN),
        *ticks,
        text(x + 56, y + 21, "quiz", "text", 15, weight=600),
        text(x + 56, y + 37, "held-out batch", PLAIN, 11),
    ]


def panel(x: int, width: int, title: str) -> list[str]:
    return [rectangle(x, 16, width, HEIGHT - 32, 10, "box"), text(x + 18, 42, title, PLAIN, 13, weight=600)]


def step(
    x: int, y: int, number: int, lines: list[str], color: str, right: int, down: int, anchor: str = "middle"
) -> list[str]:
    """A numbered disc on an arrow, and its words so far beside it."""
    disc = f'<circle cx="{x}" cy="{y}" r="11" class="f-{color}"/>'
    return [
        disc,
        text(x, y + 4.5, str(number), "page", 13, "middle", 700),
        *label(x + right, y + down, lines, color, anchor),
    ]


def label(x: int, y: int, lines: list[str], color: str, anchor: str = "start") -> list[str]:
    return [text(x, y + 15 * i, line, color, 12.5, anchor, 500) for i, line in enumerate(lines)]


def text(x: float, y: float, words: str, color: str, size: float, anchor: str = "start", weight: int = 400) -> str:
    where = f'x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text {where} class="f-{color}">{escape(words)}</text>'


def rectangle(
    x: float, y: float, width: float, height: float, radius: float, fill: str, line: str = "", dashes: str = ""
) -> str:
    look = f'class="f-{fill}{f" s-{line}" if line else ""}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" {look}/>'


def arrow(path: str, color: str, width: float = 2, dashes: str = "") -> str:
    look = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="{path}" class="s-{color}" fill="none" stroke-width="{width:g}"{look} marker-end="url(#{color})"/>'


def head(color: str) -> str:
    size = 'viewBox="0 0 8 8" markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse"'
    return f'<marker id="{color}" {size} refX="5" refY="4" orient="auto"><path d="M0 0 L8 4 L0 8 z" class="f-{color}"/></marker>'


def style() -> str:
    """Two classes a colour, for fills and for strokes, in light and in dark."""
    light, dark = (
        "".join(f".f-{name}{{fill:{PALETTE[name][i]}}}.s-{name}{{stroke:{PALETTE[name][i]}}}" for name in USED)
        for i in (0, 1)
    )
    return f"text{{font-family:{FONT}}}rect{{stroke-width:1.5}}{light}@media(prefers-color-scheme:dark){{{dark}}}"


if __name__ == "__main__":
    PICTURE.write_text(picture())
