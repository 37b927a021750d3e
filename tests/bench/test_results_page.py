"""docs/results.md: what is written is kept, tables are made from results."""

import json
from pathlib import Path

import pytest

from bench import results_page

ROOT = Path(__file__).parents[2]
FOUND = json.loads(next((ROOT / "bench" / "results").glob("comparison-*.json")).read_text()) | {
    "name": "g",
    "title": "T",
    "scale": "full",
}


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(results_page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results_page, "PAGE", tmp_path / "results.md")
    (tmp_path / "results").mkdir()
    (tmp_path / "run").mkdir()
    return tmp_path


def test_the_page_keeps_what_is_written_and_makes_tables_anew(page):
    text = "# Head\n<!-- comparison: g -->\nyesterday\n<!-- end -->\nWhat it means.\n<!-- comparison: other -->\n<!-- end -->\n"
    (page / "results.md").write_text(text)
    found = FOUND | {"missing": 0}
    (page / "run" / "comparison.json").write_text(json.dumps(found))
    results_page.main([str(page / "run")])
    written = (page / "results.md").read_text()
    assert written.startswith("# Head\n<!-- comparison: g -->\n| method |") and "yesterday" not in written
    assert "\n<!-- end -->\nWhat it means.\n<!-- comparison: other -->\nNot yet measured.\n<!-- end -->\n" in written
    (page / "run" / "comparison.json").write_text(json.dumps(found | {"scale": "small", "title": "Smaller"}))
    results_page.main([str(page / "run")])
    again = (page / "results.md").read_text()
    assert again.startswith(written) and "\n## Smaller\n<!-- comparison: g-small -->\n| method |" in again
    assert "the grid's small scale." in again
    assert results_page.update(again) == again
    assert {f.name for f in (page / "results").iterdir()} == {"comparison-g.json", "comparison-g-small.json"}


def test_the_page_takes_no_comparison_that_is_not_finished(page):
    with pytest.raises(FileNotFoundError, match="holds no comparison.json"):
        results_page.keep([str(page)])
    (page / "run" / "comparison.json").write_text(json.dumps(FOUND | {"missing": 3}))
    with pytest.raises(ValueError, match="has 3 runs to make yet"):
        results_page.keep([str(page / "run")])
    assert not list((page / "results").iterdir())


def test_the_pages_tables_are_made_from_the_results():
    text = (ROOT / "docs" / "results.md").read_text()
    assert "<!-- comparison: " in text and results_page.update(text) == text
