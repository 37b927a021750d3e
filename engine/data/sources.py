"""Where the data comes from: local files, the hub or its cache, or the embedded corpus."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.data.glue import METRICS as GLUE
from engine.data.glue import REPOSITORY, spelt
from engine.data.read import READERS, Table, class_names_of, read_file
from engine.errors import UserError
from engine.hub import Hub

Say = Callable[[str], None]

STEMS = {
    "train": ("train",),
    "quiz": ("quiz",),
    "validation": ("validation", "dev", "val", "valid", "dev_matched", "validation_matched"),
    "test": ("test",),
}
"""The names under which each split is looked for, in a folder and on the hub."""
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")


@dataclass
class Found:
    """Tables by split. For the embedded corpus, `block` is the number of rows that stand together for each sample."""

    source: str
    tables: dict[str, Table]
    block: int | None = None


def find(data: str, samples: int, hub: Hub, say: Say) -> Found:
    """Resolve --data. Existing paths come first and never touch the network."""
    path = _existing(data)
    name = spelt(data)
    if path is not None:
        if name in GLUE:
            say(f"Reading the local {'folder' if path.is_dir() else 'file'} {data}, not the data set of that name.")
        return Found("local", read_local(path, say))
    if name in GLUE:
        return _named(name, REPOSITORY, name, samples, hub, say)
    if not _looks_like_path(data) and (match := _HUB_NAME.fullmatch(data)):
        return _named(data, match["repo"], match["config"], samples, hub, say)
    if _looks_like_path(data):
        raise UserError(f"--data {data} does not exist; give an existing file or folder, or the name of a data set.")
    raise UserError(
        f"--data {data!r} is neither an existing path nor a known data set; known are {', '.join(GLUE)} and the hub's "
        "data sets as user/name or user/name:config."
    )


def _existing(data: str) -> Path | None:
    try:
        path = Path(data).expanduser()
        return path if data.strip() and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, ~ of an unknown user, a NUL character
        return None


def _looks_like_path(data: str) -> bool:
    suffix = Path(data).suffix.lower()
    return data.startswith((".", "/", "~")) or "\\" in data or data.count("/") > 1 or suffix in READERS


def read_local(path: Path, say: Say = lambda _: None) -> dict[str, Table]:
    """A folder's files by split, or a single file as the training file."""
    suffixes = ", ".join(READERS)
    if not path.is_dir():
        if path.suffix.lower() not in READERS:
            raise UserError(f"{path} has the suffix {path.suffix or '(none)'}; data files are {suffixes}.")
        return {"train": read_file(path)}
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    files: dict[str, Path] = {}
    unused = []
    for file in inside:
        if file.suffix.lower() not in READERS or not file.is_file():
            continue
        part = next((part for part, stems in STEMS.items() if file.stem.lower() in stems), None)
        if part is None:
            unused.append(file.name)
            continue
        if part in files:
            raise UserError(f"{path} has two {part} files, {files[part].name} and {file.name}; remove one of them.")
        files[part] = file
    if "train" not in files:
        found = ", ".join(file.name for file in inside[:20]) + (", ..." if len(inside) > 20 else "")
        raise UserError(
            f"{path} has no training file; looked for are train, quiz, validation (or "
            f"{', '.join(STEMS['validation'][1:])}) and test, as {suffixes}; found was {found or 'nothing'}."
        )
    if unused:
        say(_not_used(str(path), unused))
    return {part: read_file(file) for part, file in files.items()}


def _not_used(name: str, parts: list[str]) -> str:
    """MNLI has a second validation set, of other genres, and so have others what no run needs."""
    return f"{name}: not used are {', '.join(parts[:10])}{', ...' if len(parts) > 10 else ''}."


def _named(name: str, repo: str, config: str | None, samples: int, hub: Hub, say: Say) -> Found:
    """A data set of the hub, or of its cache, or the embedded corpus in its stead."""
    if hub.source == "embedded":
        if name == "sst2":
            return embedded(samples, say)
        raise UserError(
            f"--data {name} is on the hub, which --source embedded rules out; give local files or --data sst2, which "
            "then names the embedded corpus."
        )
    if hub.reachable():
        return _from_hub(repo, config, say)
    try:
        with hub.offline():
            found = _from_hub(repo, config, say)
    except UserError as error:
        # a ConnectionError only repeats that there is no network; anything else is about the cache, and is passed on
        cause = "" if isinstance(error.__cause__, ConnectionError) else f" ({_first_line(error.__cause__ or error)})"
        if hub.strict or name != "sst2":
            remedy = "give local files, or use --data sst2 with --source auto, which needs no network"
            what = f"The data set {name}, which is neither a local path nor in the local cache{cause},"
            raise hub.error(what, remedy) from error
        say(
            f"The hub cannot be reached ({hub.why}) and sst2 is not in the local cache{cause}: "
            "using the embedded corpus instead."
        )
        return embedded(samples, say)
    say(f"The hub cannot be reached ({hub.why}): reading {name} from the local cache.")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _from_hub(repo: str, config: str | None, say: Say) -> Found:
    import datasets

    datasets.disable_progress_bars()  # the console shows progress where it takes a while

    title = repo + (f":{config}" if config else "")
    try:
        loaded = datasets.load_dataset(repo, config)
    except Exception as error:  # the library raises a dozen kinds, from a missing config to a full disk
        raise UserError(
            f"The data set {title} cannot be loaded: {_first_line(error)}; check --data, as in user/name:config."
        ) from error
    parts = {part: next((stem for stem in stems if stem in loaded), None) for part, stems in STEMS.items()}
    if parts["train"] is None:
        raise UserError(f"The data set {title} has no split named train; it has {', '.join(map(str, loaded))}.")
    unused = [str(split) for split in loaded if split not in parts.values()]
    if unused:
        say(_not_used(title, unused))
    return Found("hub", {part: _hub_table(loaded[s], f"{title} {s}") for part, s in parts.items() if s is not None})


def _hub_table(dataset, name: str) -> Table:
    return Table(
        name,
        dataset.column_names,
        lambda column: dataset[column][:],
        range(1, len(dataset) + 1),
        "row",
        class_names_of(dataset.features),
        local=False,
    )


def embedded(samples: int, say: Say) -> Found:
    """The generated corpus that ships with the engine; its training rows come as one block per sample."""
    from engine.embedded import corpus

    parts = corpus.splits(samples)
    names = {"label": ("negative", "positive")}
    tables = {
        part: Table(
            f"embedded {part}",
            ["text", "label", "domain"],
            dict(zip(("text", "label", "domain"), map(list, zip(*rows, strict=True)), strict=True)).__getitem__,
            range(1, len(rows) + 1),
            "row",
            names,
        )
        for part, rows in parts.items()
    }
    block = len(tables["train"]) // samples
    say(f"The embedded corpus is generated text for demonstrations: {block:,} training examples a sample.")
    return Found("embedded", tables, block)
