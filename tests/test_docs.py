"""README and docs keep what they promise: their commands run, their links lead somewhere, their generated parts are fresh.

A bash or python block runs at a small size, or is marked with what it needs, as in `<!-- needs: hub -->` above it. Commands,
also those that only need minutes, are run by the slow tests; of any other block the commands are read by their real parsers.
"""

import re
import runpy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import NEEDS, PAGES, ROOT, Block, blocks, commands
from run_helpers import SIZES, sentences, table
from test_layers import FLOORS

from engine import cli
from engine.compare import options as compare_options
from engine.embedded import build
from engine.profiling import options as profiling_options
from engine.report.__main__ import parser as report_parser

BLOCKS = [block for page in PAGES for block in blocks(page)]
CODE = [block for block in BLOCKS if block.language in ("bash", "python")]
PARSERS = {
    "engine.train": cli.parse,
    "engine.compare": compare_options.parse,
    "engine.profiling": profiling_options.parse,
    "engine.report": lambda words: report_parser().parse_args(words),
}
MODELS = {"big-a": "bert", "big-b": "roberta", "encoder": "bert", "small": "distilbert"}  # path/to/NAME


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_marks_are_known():
    for block in BLOCKS:
        assert block.needs <= NEEDS.keys(), block
        assert block.language in ("bash", "python", "mermaid", "yaml", "toml", ""), block
        assert block.language or not re.search(r"^(python|pytest|pip|make) ", block.text, re.MULTILINE), block


# What is marked: read, not run


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with the recipes and what pages tell the reader to write."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    _write_files(tmp_path)
    monkeypatch.chdir(tmp_path)


def _write_files(folder: Path) -> None:
    for block in BLOCKS:
        if "file" in block.marks:  # <!-- file: NAME -->, which a command on the page names
            (folder / block.marks["file"]).write_text(block.text)


def _slow_if(slow: bool, value: Any) -> Any:
    return pytest.param(value, marks=[pytest.mark.slow] if slow else [])


# A second for each grid of recipes/, whose every cell goes through the parser.
@pytest.mark.parametrize("block", [_slow_if("recipes/" in b.text, b) for b in CODE if b.needs], ids=str)
def test_what_is_marked_can_be_read(block, desk):
    if block.language == "python":
        compile(block.text, str(block), "exec")
        return
    for words in commands(block.text):
        assert _read(words), f"{block}: nobody checks {words}"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=_name)
def test_commands_in_a_recipes_comments_can_be_read(recipe, desk):
    head = [line[1:] for line in recipe.read_text().partition("\ntitle:")[0].splitlines()]
    found = commands("\n".join(line for line in head if line.startswith("   ")))
    assert found and all(words[2] == "engine.compare" and _read(words) for words in found)


def _read(words: list[str]) -> bool:
    """Whether a command is one of ours, or of the tools that a page may name; a stale flag, file or target raises."""
    match words:
        case ["python" | "python3", "-m", module, *rest] if module in PARSERS:
            PARSERS[module](rest)
        case ["python" | "python3", "-m", "bench" | "docs" | "tests" as module, *_]:
            raise AssertionError(f"python -m {module}: of which module?")
        case ["python" | "python3", "-m", module, *_] if module.split(".")[0] in ("bench", "docs", "tests"):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
        case ["pytest", *rest]:
            conftest = (ROOT / "bench" / "conftest.py").read_text()
            for word in rest:
                known = word in ("-m", "slow", "gpu") or word.startswith("--benchmark-") or f'"{word}"' in conftest
                assert (ROOT / word).exists() if not word.startswith("-") and "/" in word else known, word
        case ["pytest-benchmark", "compare", _]:
            pass
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["bash", script, *_]:
            assert (ROOT / script).is_file(), script
        case ["pip", "install", *rest]:
            assert "-c" not in rest or (ROOT / rest[rest.index("-c") + 1]).is_file(), rest
        case ["python3", "-m", "venv", _] | [".", _] | [".ci/run"]:
            pass
        case _:
            return False
    return True


# What needs nothing, or minutes: run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A working directory in which `path/to/NAME` exists, a cache of its own, and no hub."""
    torch_threads, folder = torch.get_num_threads(), tmp_path_factory.mktemp("world")
    texts = [text for text, _ in sentences(300)]
    for name, alias in MODELS.items():
        model, tokenizer = build(alias, texts, 2, seed=0)
        for part in (model, tokenizer):
            part.save_pretrained(folder / "path" / "to" / name)
    (folder / "path" / "to" / "folder").mkdir()
    table(folder / "path" / "to" / "folder" / "train.tsv", sentences(200))
    _write_files(folder)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("METADISTIL_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder
    torch.set_num_threads(torch_threads)


def _quick(module: str, words: list[str]) -> list[str]:
    """The command at a small size, where it names none; settings of an earlier run stay as they are."""
    if module == "engine.report" or {"--resume", "--config", "--print_config", "--help"} & set(words):
        return words
    sizes = SIZES | {"train-size": 32} | ({"steps": 1} if module == "engine.profiling" else {})
    words = [*words, "--seeds", "1"] if module == "engine.compare" else words  # the last one counts
    return words + [w for name, n in sizes.items() if f"--{name}" not in words for w in (f"--{name}", str(n))]


def _run(block: Block, epochs: str = "3") -> None:
    """A command at a small size, an example with 3 of its 10 epochs."""
    if block.language == "python":
        names = {}
        exec(compile(block.text.replace("range(10)", f"range({epochs})"), str(block), "exec"), names)
        if "example" in block.marks:
            EXAMPLES[block.marks["example"]](names)
        return
    for _, _, module, *rest in commands(block.text):
        main = import_module(module if module == "engine.train" else f"{module}.__main__").main
        try:
            status = main(_quick(module, rest))
        except SystemExit as end:
            status = end.code or 0
        assert status == 0, f"{block}: {module} {rest}"


def _digits(names):
    assert names["accuracy"](names["student"]) > (0.88 if names["epoch"] == 9 else 0.6)
    assert all(names["accuracy"](teacher) > 0.92 for teacher in names["teachers"])


def _kernels(names):
    assert names["gradient"].shape == names["student"].shape
    assert names["second"].shape == names["teachers"][1].shape and names["second"].norm() > 0
    assert names["hidden"].grad.norm() > 0 and names["head"].grad.norm() > 0
    assert len(names["cotangents"]) == 2


def _three_classes(names):
    assert names["losses"]["quiz_loss"] < 0.6  # 1.1 is a guess's


EXAMPLES = {"digits": _digits, "kernels": _kernels, "three classes": _three_classes}


def test_every_example_has_its_check():
    assert {block.marks["example"] for block in CODE if "example" in block.marks} == EXAMPLES.keys()


def _ours(block: Block) -> bool:
    """Whether it only needs minutes, and holds nothing but commands of the engine."""
    listed = commands(block.text) if block.language == "bash" else []
    return block.needs <= {"minutes"} and all(w[:2] == ["python", "-m"] and w[2] in PARSERS for w in listed)


OURS = [block for block in CODE if _ours(block)]
QUICK = [block for block in OURS if not block.needs and block.language == "python"]


def _pages(of: list[Block]) -> list[Path]:
    return list(dict.fromkeys(block.page for block in of))


@pytest.mark.parametrize("page", _pages(QUICK), ids=_name)
def test_examples_run(page, world):
    for block in QUICK:
        if block.page == page:
            _run(block)


@pytest.mark.slow
def test_the_digits_end_where_their_page_says():
    _run(*(block for block in CODE if block.marks.get("example") == "digits"), epochs="10")


@pytest.mark.slow
@pytest.mark.parametrize("page", _pages([block for block in OURS if block not in QUICK]), ids=_name)
def test_all_commands_of_the_engine_run(page, world):
    """In the order of the page: later commands may name what earlier ones left."""
    for block in OURS:
        if block.page == page and block.language == "bash":
            _run(block)


@pytest.mark.parametrize("block", [b for b in CODE if not b.needs and b.language == "bash"], ids=str)
def test_what_needs_nothing_holds_commands_of_the_engine_alone(block):
    assert _ours(block), f"{block}: mark it with what it needs"


# Links, paths and generated parts


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", page.read_text())
    for target, anchor in [*links, *((source, "") for source in re.findall(r'<img src="([^"]+)"', page.read_text()))]:
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "log"], ids=_name)
def test_paths_exist(page):
    """Of what stands in backticks; the log names files of its days."""
    top = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in re.findall(rf"`((?:{top})/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


@cache
def _known_flags() -> set[str]:
    parsers = [cli.parser(), compare_options.parser(), profiling_options.parser(), report_parser()]
    texts = [*(parser.format_help() for parser in parsers), (ROOT / "bench" / "conftest.py").read_text()]
    return {*re.findall(r"--[a-z][\w-]*", " ".join(texts)), "--no-build-isolation", "--check"}  # of pip and ruff


@cache
def _source() -> str:
    return "".join(file.read_text() for top in ("engine", "kernels") for file in (ROOT / top).rglob("*.py"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "log"], ids=_name)
def test_flags_modules_and_variables_exist(page):
    """Of what stands in backticks."""
    text = " ".join(re.findall(r"`([^`\n]+)`", page.read_text()))
    flags = {flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if not flag.startswith("--benchmark-")}
    assert flags <= _known_flags()
    for name in re.findall(r"(?<![\w./])engine(?:\.[a-z]\w*)+", text):
        module = ROOT / name.replace(".", "/")
        assert module.is_dir() or module.with_suffix(".py").exists(), name
    for variable in re.findall(r"(?:METADISTIL|ENGINE)_[A-Z_]+", text):
        assert f'"{variable}"' in _source(), variable


@pytest.mark.parametrize(("script", "file", "make"), [
    ("make_settings", "PAGE", "page"), ("make_picture", "PICTURE", "picture"),
])  # fmt: skip
def test_generated_files_are_fresh(script, file, make):
    """Tables have tests of their own: tests/bench/test_tables.py, tests/bench/test_results_page.py."""
    made = runpy.run_path(str(ROOT / "docs" / f"{script}.py"))
    assert made[file].read_text() == made[make](), f"python -m docs.{script} writes it again"
    assert made[file].stat().st_size < 50_000


@pytest.mark.parametrize(("page", "folder"), [
    ("README.md", "methods"), ("docs/methods.md", "methods"), ("docs/methods.md", "meta/strategies"),
    ("docs/methods.md", "losses/divergences"),
])  # fmt: skip
def test_each_of_a_folder_has_its_row(page, folder):
    rows = set(re.findall(r"^\| `(\w+)` \|", (ROOT / page).read_text(), re.MULTILINE))
    assert {file.stem for file in (ROOT / "engine" / folder).glob("[a-z]*.py")} <= rows


def test_the_floors_on_the_page_are_those_of_the_test():
    text = (ROOT / "docs" / "architecture.md").read_text().partition("<!-- floors -->")[2].partition("<!-- end -->")[0]
    rows = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in text.strip().splitlines()[2:]]
    assert rows == FLOORS[::-1]
