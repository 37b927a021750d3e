"""The hub, its cache and the embedded corpus as sources of data; no test here needs a network."""

import sys
import types

import datasets
import pytest
from data_helpers import hashes, hub_data, load, numbered, parts, refused, texts, write

from engine.config import DataConfig
from engine.data.splits import load_splits
from engine.errors import UserError
from engine.hub import Hub


class FakeHub(Hub):
    def __init__(self, source, why=None):
        super().__init__(source)
        self._why = why

    def reachable(self):
        self.why = self._why
        return self.why is None


def fake_glue(rows=3000, test_label=-1):
    parts = {"train": ("t", rows, None), "validation": ("v", 50, None), "test": ("x", 40, test_label)}
    return hub_data(["sentence"], ["negative", "positive"], parts)


@pytest.fixture
def loaded(monkeypatch):
    """What `load_dataset` was asked for; `answer` is what it gives or raises."""
    state = types.SimpleNamespace(calls=[], answer=fake_glue())

    def load_dataset(*args):
        state.calls.append((args, datasets.config.HF_HUB_OFFLINE))
        if isinstance(state.answer, Exception):
            raise state.answer
        return state.answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return state


@pytest.fixture
def corpus(monkeypatch):
    """A stand-in of 200 training rows a sample for the generated corpus."""

    def splits(samples):
        sizes = {"train": 200 * samples, "quiz": 10, "validation": 20, "test": 30}
        return {part: [(f"{part} {i}", i % 2, "ab"[i % 4 // 2]) for i in range(size)] for part, size in sizes.items()}

    package, module = types.ModuleType("engine.embedded"), types.ModuleType("engine.embedded.corpus")
    module.splits, package.corpus = splits, module
    monkeypatch.setitem(sys.modules, "engine.embedded", package)
    monkeypatch.setitem(sys.modules, "engine.embedded.corpus", module)


def from_hub(data="sst2", source="auto", why=None, samples=1, **config):
    return load_splits(DataConfig(data=data, **config), samples, FakeHub(source, why), lambda message: None)


def test_glue_from_the_hub(loaded):
    splits = from_hub("SST-2", train_size=500)
    assert loaded.calls == [(("nyu-mll/glue", "sst2"), False)]
    assert splits.source == "hub" and splits.task.label_names == ("negative", "positive")
    assert any("test has no labels" in note and "cut from train" in note for note in splits.notes)
    assert len(splits.validation) == 50 and len(splits.test) == 2000 and len(splits.quiz) == 100
    assert {text[0] for text in splits.test["text"]} == {"t"}
    loaded.answer = fake_glue(test_label=1)
    assert {text[0] for text in from_hub(train_size=500).test["text"]} == {"x"}


@pytest.mark.parametrize(
    ("data", "asked"), [("user/name", ("user/name", None)), ("user/na.me:conf-1", ("user/na.me", "conf-1"))]
)
def test_other_data_of_the_hub(loaded, data, asked):
    from_hub(data, train_size=500)
    assert loaded.calls == [(asked, False)]


def test_broken_rows_of_the_hub_are_left_out(loaded):
    rows = {"text": [f"t {i}" if i else "" for i in range(300)], "label": [-1 if i == 1 else i % 2 for i in range(300)]}
    loaded.answer = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    splits = from_hub("user/name")
    assert any("2 rows without a text or a label left out" in note for note in splits.notes)
    loaded.answer = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows | {"label": [-1.0 if i == 1 else i / 2 for i in range(300)]})
    )
    assert any("1 row without" in note for note in from_hub("user/name").notes)  # -1 is a number in a regression


@pytest.mark.parametrize("source", ["auto", "hub"])
def test_errors_of_the_hub_are_one_sentence(loaded, source):
    loaded.answer = ValueError("BuilderConfig 'x' not found.\nAvailable: a, b")
    with pytest.raises(
        UserError, match=r"user/name:x cannot be loaded: BuilderConfig 'x' not found; check --data"
    ) as error:
        from_hub("user/name:x", source)
    assert "\n" not in str(error.value)
    loaded.answer = datasets.DatasetDict(validation=fake_glue()["validation"])
    with pytest.raises(UserError, match="no split named train; it has validation"):
        from_hub("user/name", source)


@pytest.mark.parametrize("source", ["auto", "hub"])
def test_cache_without_the_hub(loaded, source):
    splits = from_hub("cola", source, "no answer within 5 s", train_size=500)
    assert splits.source == "hub" and loaded.calls == [(("nyu-mll/glue", "cola"), True)]  # asked while offline
    assert any("no answer within 5 s" in note and "local cache" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("data", "source"), [("cola", "auto"), ("user/name", "auto"), ("sst2", "hub"), ("cola", "hub")]
)
def test_neither_hub_nor_cache(loaded, data, source):
    loaded.answer = ConnectionError("no")
    with pytest.raises(UserError, match=r"hub cannot be reached \(HF_HUB_OFFLINE is set\); give local files"):
        from_hub(data, source, "HF_HUB_OFFLINE is set")


def test_sst2_falls_back_on_the_embedded_corpus(loaded, corpus):
    loaded.answer = ConnectionError("no")
    one, two = (from_hub(why="name resolution failed", samples=n, train_size=150) for n in (1, 2))
    assert one.source == "embedded" and one.task.label_names == ("negative", "positive")
    assert "name resolution failed" in one.notes[0]
    assert [len(part) for part in parts(two).values()] == [10, 20, 30, 150, 150]
    assert hashes(one).items() <= hashes(two).items()
    assert not set(texts(two.train[0])) & set(texts(two.train[1]))


def test_source_embedded(corpus, loaded, tmp_path):
    splits = load("sst2")
    assert splits.source == "embedded" and len(splits.train[0]) == 200 and not loaded.calls
    assert "--source embedded" in refused("cola") and "--source embedded" in refused("user/name")
    assert load(write(tmp_path / "a.tsv", numbered(50))).source == "local"


def test_a_local_folder_wins_over_a_name(loaded, tmp_path, monkeypatch):
    (tmp_path / "sst2").mkdir()
    write(tmp_path / "sst2" / "train.tsv", numbered(50))
    monkeypatch.chdir(tmp_path)
    splits = from_hub("sst2")
    assert splits.source == "local" and not loaded.calls and "local folder sst2" in splits.notes[0]
