"""The embedded demonstration: its corpus is fair and stable, its miniatures are real, proportioned and reproducible."""

import hashlib
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from engine import embedded
from engine.errors import UserError

PUBLISHED = {"bert": 109_483_778, "roberta": 124_647_170, "distilbert": 66_955_010, "tinybert": 14_350_874}
CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "tinybert": "Bert"}


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


@pytest.fixture(scope="module")
def parts():
    return embedded.splits(2)


@pytest.fixture(scope="module")
def texts():
    return [text for text, _ in embedded.generate(1500, seed=3)]


@pytest.fixture(scope="module")
def built(texts):
    return {alias: embedded.build(alias, texts, num_labels=2, seed=0) for alias in embedded.ALIASES}


# Corpus


def test_corpus_is_another_one_for_another_seed_and_begins_the_longer_one():
    assert embedded.generate(500, 3) != embedded.generate(500, 4)
    assert embedded.generate(1000, seed=2)[:100] == embedded.generate(100, seed=2)


@pytest.mark.parametrize("count", [0, 1, 301, 4000])
def test_corpus_is_distinct_and_balanced(count):
    rows = embedded.generate(count, seed=1)
    assert len(rows) == count == len({text.lower() for text, _ in rows})
    good = sum(label for _, label in rows)
    assert abs(2 * good - count) <= 1
    assert {label for _, label in rows} <= {0, 1}


def test_splits_are_disjoint_sized_and_stable(parts):
    everything = [text for rows in parts.values() for text, _, _ in rows]
    assert len(set(everything)) == len(everything)
    assert {name: len(rows) for name, rows in parts.items()} == {
        "quiz": 100,
        "validation": 872,
        "test": 2000,
        "train": 2 * embedded.SIZES["train"],
    }
    four = embedded.splits(4)
    assert all(four[name] == parts[name] for name in ("quiz", "validation", "test"))
    assert four["train"][: len(parts["train"])] == parts["train"]
    for name, rows in parts.items():
        assert 2 * sum(label for _, label, _ in rows) == len(rows), f"{name} is not balanced"


def test_domains(parts):
    """Every one in every split, in like shares; texts of one are about its own things."""
    names = {"films", "books", "phones", "food", "hotels"}
    for rows in parts.values():
        counts = Counter(domain for _, _, domain in rows)
        assert counts.keys() == names and max(counts.values()) < 2 * min(counts.values()) + 10
    told = {"films": "screenplay", "books": "imagery", "phones": "touchpad", "food": "dumplings", "hotels": "lobby"}
    for name, word in told.items():
        assert {domain for text, _, domain in parts["train"] if word in words(text)} == {name}


def test_vocabulary_is_of_a_natural_size_and_no_single_word_decides(parts):
    rows = [(set(words(text)), label) for text, label, _ in parts["train"]]
    counts = Counter((word, label) for found, label in rows for word in found)
    assert 600 <= len({word for word, _ in counts}) <= 900
    goods, total = sum(label for _, label in rows), len(rows)
    for word in {word for word, _ in counts}:
        right = (counts[word, 1] + (total - goods) - counts[word, 0]) / total
        assert max(right, 1 - right) < 0.70, word


def test_bag_of_words_falls_short(parts):
    """Logistic regression on word counts: better than chance, far below what the teachers reach (about 96 %)."""
    train, held_out = parts["train"][: embedded.SIZES["train"]], parts["validation"]
    counts = CountVectorizer(token_pattern=r"[\w'-]+")
    model = LogisticRegression().fit(counts.fit_transform([row[0] for row in train]), [row[1] for row in train])
    assert 0.55 < model.score(counts.transform([row[0] for row in held_out]), [row[1] for row in held_out]) < 0.85


READINGS = [
    (r"^The \w+ (was|were) superb\.$", 1),
    (r"^The \w+ (was|were) far from superb\.$", 0),
    (r"^The \w+ (was|were) (never|hardly|scarcely|not) terrible\.$", 1),
    (r"lthough [^:]*, the \w+ (is|are|was|were) (superb|brilliant|admirable|powerful|terrific|sturdy)\.$", 1),
    (r", but the \w+ (is|are|was|were) (awful|terrible|dull)\.$", 0),
]


def test_labels_follow_the_reading():
    many = embedded.generate(12_000, seed=5)
    for pattern, label in READINGS:
        labels = [y for text, y in many if re.search(pattern, text)]
        assert labels and set(labels) == {label}, pattern


# Models


@pytest.mark.parametrize("alias", embedded.ALIASES)
def test_real_classes_in_their_published_proportions(built, alias):
    size = {name: sum(p.numel() for p in model.parameters()) for name, (model, _) in built.items()}
    assert type(built[alias][0]).__name__ == f"{CLASSES[alias]}ForSequenceClassification"
    assert size[alias] / size["bert"] == pytest.approx(PUBLISHED[alias] / PUBLISHED["bert"], rel=0.10)
    bert, distilbert = built["bert"][0].config, built["distilbert"][0].config
    assert (distilbert.n_layers * 2, distilbert.dim) == (bert.num_hidden_layers, bert.hidden_size)


@pytest.mark.parametrize("alias", embedded.ALIASES)
def test_same_seed_same_weights_and_global_state_untouched(texts, alias):
    before = torch.get_rng_state()
    first, again, other = (embedded.build(alias, texts[:100], 2, seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], value) for name, value in again.items())
    assert not all(torch.equal(first[name], value) for name, value in other.items())


@pytest.mark.parametrize("num_labels, problem_type", [(3, "single_label_classification"), (1, "regression")])
@pytest.mark.parametrize("alias", embedded.ALIASES)
def test_heads(texts, alias, num_labels, problem_type):
    model, tokenizer = embedded.build(alias, texts[:100], num_labels, seed=0, problem_type=problem_type)
    batch = tokenizer(["a film", "a book about a film"], padding=True, return_tensors="pt")
    assert model.config.problem_type == problem_type
    assert model(**batch).logits.shape == (2, num_labels)


def test_unknown_alias_names_the_known_ones():
    with pytest.raises(UserError, match="bert, roberta, distilbert, tinybert"):
        embedded.build("gpt2", ["a"], 2, 0)


# Tokenizers


@pytest.mark.slow
def test_corpus_and_tokenizers_are_the_same_in_every_process(texts, built, tmp_path):
    """The bert family has one tokenizer; ties are broken by no hash."""
    saved = {}
    for alias, (_, tokenizer) in built.items():
        tokenizer.save_pretrained(tmp_path / alias)
        saved[alias] = (tmp_path / alias / "tokenizer.json").read_bytes()
    assert len({saved[alias] for alias in ("bert", "distilbert", "tinybert")}) == 1
    code = """
import hashlib, pathlib, tempfile
from engine.embedded import build, generate
texts = [text for text, _ in generate(1500, seed=3)]
print(hashlib.sha256(repr(texts).encode()).hexdigest())
folder = pathlib.Path(tempfile.mkdtemp())
for alias in ("bert", "roberta"):
    build(alias, texts, 2, 0)[1].save_pretrained(folder / alias)
    print(hashlib.sha256((folder / alias / "tokenizer.json").read_bytes()).hexdigest())
"""
    expected = [repr(texts).encode(), saved["bert"], saved["roberta"]]
    command, other = [sys.executable, "-c", code], {"PYTHONHASHSEED": "7"}
    said = subprocess.run(command, env=other, capture_output=True, text=True, check=True).stdout
    assert said.split() == [hashlib.sha256(content).hexdigest() for content in expected]


@pytest.mark.parametrize("alias", ["bert", "roberta"])
def test_tokenizer_round_trip(built, texts, alias, tmp_path):
    tokenizer = built[alias][1]
    tokenizer.save_pretrained(tmp_path)
    built[alias][0].config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    first, second = texts[:50] + ["Zürich, 北京 & 🙂!", ""], texts[50:100] + ["<s> [SEP] odd", "b"]
    for arguments in [(first,), (first, second)]:
        for options in [{}, {"truncation": True, "max_length": 12}, {"padding": True}]:
            assert tokenizer(*arguments, **options).data == loaded(*arguments, **options).data
    assert loaded.model_max_length == tokenizer.model_max_length == 128


@pytest.mark.parametrize("alias", embedded.ALIASES)
def test_longest_input_fits_the_model(built, alias):
    model, tokenizer = built[alias]
    batch = tokenizer("very good " * 400, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == tokenizer.model_max_length
    assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("alias", ["bert", "roberta"])
@pytest.mark.parametrize(
    "foreign", [[], [""], ["a"], ["非常好的电影", "糟糕"], ["".join(map(chr, range(0x4E00, 0x5200)))] * 3]
)
def test_any_texts_will_do(alias, foreign):
    model, tokenizer = embedded.build(alias, foreign, 2, 0)
    assert len(tokenizer) <= 2_500
    batch = tokenizer(["Unseen wörds ☂ 龍", "非常好"], padding=True, return_tensors="pt")
    assert int(batch["input_ids"].max()) < model.config.vocab_size
    assert model(**batch).logits.isfinite().all()
    if alias == "roberta":
        assert tokenizer.decode(tokenizer("Unseen wörds ☂ 龍")["input_ids"], skip_special_tokens=True) == (
            "Unseen wörds ☂ 龍"
        )
