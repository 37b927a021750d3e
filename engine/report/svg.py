"""Drawings as part of a page: colours as variables of the page, names of their own, no fonts, nothing from elsewhere.

Matplotlib draws; what is done here it does not offer: colours that follow the page's light or dark scheme, ids that are unique
on a page of many drawings, text in the reader's fonts. Plotly and Bokeh would need scripts, which a page does not hold.
"""

from __future__ import annotations

import io
import re
import warnings
from xml.etree import ElementTree

from matplotlib.figure import Figure

from engine.report.style import LIGHT, settled
from engine.report.units import printable

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
VARIABLES = {light: f"var(--{name})" for name, light in LIGHT.items()}


def inline(figure: Figure, name: str, words: str) -> str:
    """The <svg> element of a figure that was drawn in the colours of `style.PALETTE`.

    name: a prefix for its ids, unique on the page; words: what somebody who cannot see it is told.
    """
    drawn = io.StringIO()
    with settled(**{"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts count, not matplotlib's
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(drawn.getvalue().encode())
    _drop(root, {f"{{{SVG}}}metadata", f"{{{SVG}}}style"})
    named = set(re.findall(r"(?:href=\"|url\()#([\w-]+)", drawn.getvalue()))
    for element in root.iter():
        _clean(element, name, named)
    for unwanted in ("width", "height", "version"):
        root.attrib.pop(unwanted, None)
    root.set("role", "img")
    root.set("aria-label", printable(words))
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _drop(element: ElementTree.Element, tags: set[str]) -> None:
    for child in list(element):
        if child.tag in tags:
            element.remove(child)
        else:
            _drop(child, tags)


def _clean(element: ElementTree.Element, name: str, named: set[str]) -> None:
    """One element's attributes: its id if anything refers to it, references, colours and coordinates."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            if value in named:
                element.set("id", f"{name}-{value}")
            else:
                del element.attrib["id"]
        elif key == f"{{{XLINK}}}href":
            del element.attrib[key]
            element.set("href", f"#{name}-{value[1:]}")
        elif key == "style":
            element.set("style", _style(value))
        elif key == "clip-path":
            element.set(key, re.sub(r"url\(#([\w-]+)\)", rf"url(#{name}-\1)", value))
        elif key in ("d", "x", "y", "transform", "width", "height"):
            rounded = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)
            element.set(key, " ".join(rounded.split()))
    if element.text is not None and not element.text.strip():
        element.text = None
    if element.tail is not None and not element.tail.strip():
        element.tail = None


def _style(value: str) -> str:
    parts = [part.strip() for part in value.split(";")]
    kept = [part for part in parts if part and not part.startswith("font-family")]
    found = re.sub(r"#[0-9a-f]{6}\b", lambda m: VARIABLES[m[0]], "; ".join(kept))  # a KeyError: not from the palette
    return re.sub(r"\bfont: ([\d.]+px)[^;]*", r"font-size: \1", found)
