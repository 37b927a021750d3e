"""Pages in a real browser, where there is one: narrow, light, dark and printed."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from report_helpers import make_run
from run_helpers import summary as summary_of

from engine.report import pages
from engine.report.style import PALETTE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: install it to look at pages as they are shown"),
]

# Each page in a frame as narrow as a phone; what is found there becomes this document's text.
LOOK = """<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>
%s
<script>
const frames = [...document.querySelectorAll("iframe")];
Promise.all(frames.map(f => new Promise(done => f.addEventListener("load", done)))).then(() => {
  const found = frames.map(frame => {
    const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
    const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg, .skip") &&
      e.getBoundingClientRect().right > root.clientWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
    const line = page.querySelector('figure path[style*="var(--series-1)"]');
    const text = page.querySelector("figure text");
    return {
      width: root.clientWidth, scrolled: root.scrollWidth, wide, scripts: page.scripts.length,
      resources: view.performance.getEntriesByType("resource").length,
      page: view.getComputedStyle(page.body).backgroundColor, text: view.getComputedStyle(page.body).color,
      line: line && view.getComputedStyle(line).stroke, label: text && view.getComputedStyle(text).fill,
      size: text && text.getBoundingClientRect().height,
      drawn: [...page.querySelectorAll("figure > svg")].map(s => s.getBoundingClientRect().width),
      boxes: [...page.querySelectorAll(".scroll")].some(s => s.scrollWidth > s.clientWidth),
    };
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


def browse(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
               "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=5000", *flags]  # fmt: skip
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory, comparison):
    """Pages of a run, of one whose names have no place to break, of several runs, and of a comparison."""
    base = tmp_path_factory.mktemp("pages")
    run, long = make_run(base / "run", steps=120), make_run(base / ("long" * 40), steps=60, config={"data": "x" * 300})
    found = summary_of(long)
    found["student"]["name"] = found["warnings"][0] = found["notes"][0] = found["command"] = "name" * 60
    found["versions"]["package" * 30] = "1" * 90
    (long / "summary.json").write_text(json.dumps(found))
    files = [pages.write([one], None)[0] for one in (run, long, comparison)]
    return [*files, pages.write([run, long, comparison], base / "several.html")[0]]


def looked(made: list[Path], folder: Path, scheme: int) -> list[dict]:
    frames = "\n".join(
        f'<iframe src="{file.as_uri()}" width="375" height="700" style="border: 0"></iframe>' for file in made
    )
    (folder / "look.html").write_text(LOOK % frames)
    done = browse(
        folder, f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", (folder / "look.html").as_uri()
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(unescape(re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)[1]))


def rgb(color: str) -> str:
    return f"rgb({int(color[1:3], 16)}, {int(color[3:5], 16)}, {int(color[5:7], 16)})"


@pytest.mark.parametrize(("name", "scheme"), [("dark", 0), ("light", 1)])
def test_pages_on_a_phone(made, tmp_path, name, scheme):
    colors = {key: rgb(both[name == "dark"]) for key, both in PALETTE.items()}
    for file, found in zip(made, looked(made, tmp_path, scheme), strict=True):
        assert found["wide"] == [] and found["scrolled"] == found["width"] <= 375, (file, found)
        assert found["scripts"] == found["resources"] == 0
        assert (found["page"], found["text"]) == (colors["page"], colors["text"])
        assert (found["line"], found["label"]) == (colors["series-1"], colors["muted"])
        assert min(found["drawn"]) > 300 and found["size"] > 9  # pixels
        assert found["boxes"]  # a wide table scrolls in its own


def printed(folder: Path, name: str, text: str) -> int:
    """How many sheets a page takes."""
    page, file = folder / f"{name}.html", folder / f"{name}.pdf"
    page.write_text(text)
    browse(folder, f"--print-to-pdf={file}", page.as_uri())
    content = file.read_bytes()
    assert content.startswith(b"%PDF")
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", content))


def test_what_is_folded_on_the_screen_is_printed(made, tmp_path):
    text = made[0].read_text()
    rule = next(line for line in text.splitlines() if "::details-content" in line)
    folded = printed(tmp_path, "folded", text.replace(rule, ""))
    assert (
        folded
        < printed(tmp_path, "page", text)
        == printed(tmp_path, "open", text.replace("<details>", "<details open>"))
        <= 12
    )
