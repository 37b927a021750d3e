"""The page of a run: what it says, that it needs nothing else, that everybody can read it, that nothing in it is run."""

import json
import re
import shlex
from pathlib import Path

import pytest
from page_reader import EVIL, Reader, table
from report_helpers import SECONDS, make_run, page_of, settings
from run_helpers import summary as summary_of

from engine import cli
from engine.compare import options
from engine.report.__main__ import main
from engine.report.layout import MARK
from engine.report.load import read
from engine.report.settings import commands, sorted_out
from engine.report.style import PALETTE

TRAINING = {name: s for name, s in SECONDS.items() if name not in ("evaluation", "checkpoint")}


@pytest.fixture(scope="module")
def variants(tmp_path_factory, page):
    """Runs with and without telemetry, finished and not."""
    base = tmp_path_factory.mktemp("variants")
    made = {
        "cpu": make_run(base / "cpu", steps=60, cuda=False), "old": make_run(base / "old", steps=60, telemetry=False),
        "part": make_run(base / "part", steps=60, finished=False, lines=40),
        "begun": make_run(base / "begun", finished=False, lines=0),
    }  # fmt: skip
    return {name: page_of(run) for name, run in made.items()} | {"gpu": page}


# What it says


def test_headings_and_lead(page):
    read = Reader(page)
    assert read.said("title") == read.said("h1") == ["distilbert from bert and roberta by MetaDistil"]
    lead = " ".join(read.said("p"))
    for part in ("The student distilbert (66,955,010 parameters) was trained by MetaDistil with two teachers, bert (109,483,778 parameters) "
                 "and roberta (124,647,170 parameters). It is 1.75 times smaller than the mean of its teachers.",
                 "Data: sst2, 8,000 training examples (and 1 further sample for teachers), 100 for the quiz, 872 for validation and "
                 "2,000 for the test.", "took 300 optimizer steps on NVIDIA H100 80GB HBM3;"):  # fmt: skip
        assert part in lead, part
    assert read.said("h2") == [
        "Results", "Curves", "Time and memory", "Energy and device", "Machine and versions", "Remarks", "Settings", "Commands",
    ]  # fmt: skip
    assert "teacher roberta fell from accuracy 0.9400 to 0.9180" in read.words()


def test_results(page):
    head, *rows = table(page, "results-table")
    assert head == ["model", "measured on", "accuracy, %", "F1", "Matthews", "parameters"]
    assert rows[0] == ["bert (teacher)", "validation, as prepared", "93.40", "0.9300", "0.8580", "109,483,778"]
    assert rows[1] == ["", "validation", "93.80", "0.9340", "0.8660", ""]
    assert rows[-1] == ["", "test", "90.95", "0.9055", "0.8090", ""]
    assert [row[0] for row in rows if row[0]] == ["bert (teacher)", "roberta (teacher)", "distilbert (student)"]


def test_sections_add_up_to_a_step(page):
    head, *rows, total = table(page, "sections-2")
    assert head == ["section", "ms per step", "share", "peak memory, GiB", "J per step"]
    assert [row[0] for row in rows] == list(SECONDS)
    assert [float(row[1]) for row in rows] == pytest.approx([1000 * s for s in SECONDS.values()], abs=0.05)  # as shown
    assert float(total[1]) == pytest.approx(1000 * sum(SECONDS.values()), abs=0.05)
    assert sum(float(row[2].rstrip(" %")) for row in rows) == pytest.approx(100, abs=0.05 * len(rows))
    assert {row[3] for row in rows} == {"4.20", "6.80"} and total[3] == "6.80"
    assert float(total[4]) == pytest.approx(312 * sum(SECONDS.values()), abs=0.05)
    most = max(SECONDS, key=SECONDS.get)
    assert f'--part: 1.0000">{100 * SECONDS[most] / sum(SECONDS.values()):.1f} %' in page


def test_a_run_that_is_not_finished(variants):
    _, *rows, total = table(variants["part"], "sections-2")  # from the records
    assert [row[0] for row in rows] == list(TRAINING)
    assert float(total[1]) == pytest.approx(1000 * sum(TRAINING.values()), rel=0.03)  # the fixture's slow wave
    words = Reader(variants["part"]).words()
    for part in ("phase “metadistil”, step 15. Best validation accuracy of this phase so far: ", "Not finished",
                 "python -m engine.train --resume --output"):  # fmt: skip
        assert part in words
    assert "Nothing has been logged yet." in variants["begun"] and "<figure" not in variants["begun"]


@pytest.mark.usefixtures("undrawn")
def test_domains(run):
    found = summary_of(run)
    for k, entry in enumerate([*found["teachers"], found["student"]]):
        entry["by_domain"] = {"test": {name: {"accuracy": 0.9 - 0.1 * k} for name in ("books", "<b>dvd")}}
    (run / "summary.json").write_text(json.dumps(found))
    assert table(page_of(run), "domains")[1:] == [
        ["bert", "90.00", "90.00", "90.00"], ["roberta", "80.00", "80.00", "80.00"], ["distilbert", "70.00", "70.00", "70.00"],
    ]  # fmt: skip
    assert "&lt;b&gt;dvd" in (run / "report.html").read_text()


def test_curves_and_what_is_said_of_them(page):
    labels = {label.split(".")[0]: label for label in Reader(page).labels()}
    assert list(labels) == [
        "Validation accuracy: metadistil", "Loss: metadistil", "Drift of the teachers",
        "Weight of each teacher in the mean of the logits", "Validation accuracy: preparation of the teachers",
        "Loss: preparation of the teachers", "Examples per second", "Tokens per second", "Memory over time", "Power", "Energy per step",
        "Use of the device", "Use of the processor", "Clocks", "Temperature", "PCIe",
    ]  # fmt: skip
    assert "teacher bert, as prepared: 93.40 % throughout" in labels["Validation accuracy: metadistil"]
    drift = labels["Drift of the teachers"]
    assert "bert: 0.16 % at step 50, 0.40 % at step 300; lowest 0.16 % at step 50, highest 0.40 % at step 300." in drift
    for name in ("quiz loss: ", "pilot loss: ", " loss: "):
        assert name in labels["Loss: metadistil"]
    assert "limit: 700 W throughout" in labels["Power"]
    assert "moving means over 7 values" in page and "each the mean of up to 20 steps" in page


def test_energy_or_the_cause_of_none(variants):
    """An old run has all but telemetry."""
    only = {"gpu": ["All phases together took 54.8 kJ (15.2 Wh)", "as if power were constant"],
            "cpu": ["resident memory of the process", "(no NVML: libnvidia-ml.so.1 is not installed)."],
            "old": ["made without telemetry"]}  # fmt: skip
    for name, parts in only.items():
        for part in parts:
            assert [other for other in ("gpu", "cpu", "old") if part in variants[other]] == [name]
    assert "throttling" not in variants["cpu"]
    assert {"Results", "Curves", "Time and memory", "Settings", "Commands"} <= set(Reader(variants["old"]).said("h2"))
    assert table(variants["old"], "phases")[1][:2] == ["prepare bert", "60"] and "sections-" not in variants["old"]


@pytest.mark.usefixtures("undrawn")
def test_throttling_is_named(tmp_path):
    page = page_of(make_run(tmp_path / "run", steps=600))
    assert re.search(r"throttling\) at 20 of 120 readings: power cap\.", page)


def test_facts(page):
    facts = dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page))
    assert facts["padding"] == "6.1 % of the tokens of training batches"
    assert facts["torch"] == "2.13.0+cu130" and facts["UUID"] == "GPU-00000000" and facts["commit"] == "0123456789ab"
    tiles = re.findall(r'<dt>(.*?)</dt><dd class="value">(.*?)</dd>', page)
    assert tiles == [("accuracy on test", "90.95 %"), ("times smaller", "1.75"), ("training of the student", "55.5 s"),
                     ("peak memory", "6.90 GiB"), ("energy", "54.8 kJ")]  # fmt: skip


# Settings and commands


def test_settings_that_differ_come_first(page):
    assert table(page, "given")[1:] == [["teachers", "bert,roberta", "bert"], ["train_size", "8000", "30000"], ["seed", "3", "0"],
                                        ["precision", "bf16", "fp32"]]  # fmt: skip
    assert page.index('id="given"') < page.index("<details>", page.index('id="given"')) < page.index('id="defaults"')
    found = sorted_out(settings())
    assert len(found.given) + len(found.chosen) + len(found.rest) == len(settings()) - 3  # the places are none of them
    assert "temperature" in found.chosen and "max_grad_norm" in found.rest


@pytest.mark.parametrize("changes", [
    {}, {"compile": True, "noise_teacher": 0.2, "student_layers": "1,3", "lr": 1.5e-05, "max_steps": 7},
    {"data": "my data/it's", "target_domain": "-x", "domain_column": "a b"},
])  # fmt: skip
def test_the_flags_of_a_run_are_its_settings_again(tmp_path, changes):
    run = make_run(tmp_path / "run", finished=False, lines=0, config=changes)
    known = {what: shlex.split(command)[2:] for what, command in commands(read(run))}
    for what in ("Repeat the run with flags alone", "Repeat the run from its settings file"):
        module, *words = known[what]
        assert module == "engine.train" and cli.parse(words).to_flat() == settings(seed=3, **changes)
    assert known["Continue the run"] == ["engine.train", "--resume", "--output", str(run)]


def test_the_comparison_that_is_proposed_can_be_run(folder):
    words = shlex.split(dict(commands(read(folder)))["Compare the method with others, over five seeds"])
    grid = options.parse(words[3:]).grid
    assert grid.seeds == [0, 1, 2, 3, 4]
    assert {row.method for row in grid.rows} >= {"finetune", "kd", "metadistil"}


# One file that needs no other, readable for everybody


@pytest.mark.parametrize("name", ["gpu", "cpu", "old", "part", "begun"])
def test_the_page_is_whole_and_asks_for_nothing(variants, name):
    text = variants[name]
    read = Reader(text)
    assert text.startswith("<!DOCTYPE html>") and MARK in text[:2000]
    assert not read.tags() & {"script", "img", "iframe", "object", "embed", "image", "foreignobject", "base", "form"}
    assert not re.search(r"https?:|//\w|@import|javascript:", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    assert {a.get("href") for a in read.of("link")} == {"data:,"}
    assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)\)", text))
    assert not [key for _, a, _ in read.elements for key in a if key.startswith("on") or key == "src"]
    wanted = {a["href"][1:] for _, a, _ in read.elements if a.get("href", "").startswith("#")}
    wanted |= {a["aria-labelledby"] for _, a, _ in read.elements if "aria-labelledby" in a}
    assert wanted | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(read.ids)


def test_headings_tables_and_drawings_are_named(page):
    read = Reader(page)
    levels = [int(tag[1]) for tag, _, _ in read.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert len(read.of("caption")) == len(read.of("table")) > 5
    assert all("scope" in attributes for attributes in read.of("th"))
    for a in read.of("svg"):
        assert a.get("aria-hidden") == "true" or (a["role"] == "img" and len(a["aria-label"]) > 30)
    assert read.of("html") == [{"lang": "en"}] and any(a.get("name") == "viewport" for a in read.of("meta"))
    around = [(above[-1], a) for tag, a, above in read.elements if tag == "table"]
    assert all(each == ("div", {}) for each in around)  # in a box of its own, which scrolls
    assert page.count('<div class="scroll" role="region" tabindex="0"') >= len(around)


def test_every_color_of_a_drawing_is_one_of_the_page(page):
    body = page[page.index("</head>") :]
    assert not re.search(r"#[0-9a-f]{6}\b|rgb\(|fill: black|stroke: black", body)
    used = set(re.findall(r"var\(--([\w-]+)\)", body))
    assert {"muted", "rule", "series-1", "series-2"} <= used <= PALETTE.keys()
    assert page.count("--series-1: ") == 2  # light and dark
    before = page[: page.index(f"--series-1: {PALETTE['series-1'][1]}")]
    # paper is white
    assert before.rfind("@media screen and (prefers-color-scheme: dark)") > before.rfind("--series-1: ")


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, two: str) -> float:
    low, high = sorted(map(luminance, (one, two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme):
    """WCAG 2.2 AA: 4.5 for text, 3 for what is drawn. A seed's point may be paler: its mean lies beside it, darker."""
    colors = {name: both[scheme] for name, both in PALETTE.items()}
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    texts = [(text, ground) for text in ("text", "muted", "link") for ground in ("page", "box")]
    texts += [("text", "warn-box"), ("warn", "warn-box"), ("warn", "page"), ("text", "bar")]
    drawn = [(name, "page") for name in colors if name.startswith("series-") or name in ("ours", "published")]
    for least, pairs in ((4.5, texts), (3, drawn)):
        assert [pair for pair in pairs if contrast(colors[pair[0]], colors[pair[1]]) < least] == []
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)  # a drawing's colours are told apart by them


# Hostile content


def test_nothing_that_a_run_holds_becomes_markup(tmp_path):
    run = make_run(tmp_path / ("<script>" + "$x^{ &quot;'"), steps=60, config={"data": EVIL, "target_domain": EVIL})
    found = summary_of(run)
    for entry in [*found["teachers"], found["student"]]:
        entry["name"] = entry["source"] = EVIL
        entry["metrics"] = {EVIL: {EVIL: 0.5}} | entry["metrics"]
        entry["by_domain"] = {"test": {f"{EVIL}{k}": {"accuracy": 0.5} for k in range(2)}}
    found |= {"warnings": [EVIL], "notes": [EVIL], "command": EVIL, "versions": {EVIL: EVIL}, "git_commit": EVIL, "method": EVIL,
              "device": {"name": EVIL, "device": EVIL}, "settings": found["settings"] | {EVIL: EVIL}}  # fmt: skip
    found["phases"] |= {EVIL: {"seconds": 1.0, "steps": 5}}
    found["telemetry"] |= {"cause": EVIL, "device": {EVIL: EVIL}}
    found["telemetry"]["phases"]["metadistil"]["sections"][EVIL] = {"seconds": 1.0}
    (run / "summary.json").write_text(json.dumps(found))
    record = {"phase": EVIL, "loss": 1.0, f"drift/{EVIL}": 0.1, f"{EVIL}_loss": 0.5, "validation/accuracy": 1}
    with open(run / "metrics.jsonl", "a") as f:
        f.writelines(json.dumps(record | {"step": step}) + "\n" for step in range(1, 4))
    text = page_of(run)
    read = Reader(text)
    assert "script" not in read.tags() and "<script" not in text and text.count("</style>") == 1
    assert not [a for _, a, _ in read.elements if any(key.startswith("on") for key in a)]
    assert "<script>alert(1)</script>" in read.words()  # it is said, not done
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text) and "\ufffd" in text
    assert any("<script>alert(1)" in label for label in read.labels())


# Where it is written


@pytest.mark.usefixtures("undrawn")
def test_a_page_replaces_a_page_and_nothing_else(folder, tmp_path, capsys, monkeypatch):
    file = tmp_path / "x.html"
    words = [str(folder), "--output", str(file)]
    file.write_text("<!DOCTYPE html><p>mine</p>")
    for output, says in ((file, f"{file} exists and is no page of engine.report; name another file with --output."),
                         (tmp_path, "is a directory; name a file in it"), (tmp_path / "none/x.html", "there is no directory"),
                         (file / "x.html", "there is no directory")):  # fmt: skip
        assert main([*words[:2], str(output)]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert file.read_text() == "<!DOCTYPE html><p>mine</p>"
    file.write_text(MARK)
    assert main(words) == 0
    page = file.read_text()
    assert main(words) == 0 and file.read_text() == page != MARK  # the same run has the same bytes

    def write_text(self, *_, **__):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    assert main(words) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert file.read_text() == page and [path.name for path in tmp_path.iterdir()] == ["x.html"]
