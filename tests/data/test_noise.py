"""Noise in training batches: whole words, no special token, a function of seed, epoch and row; nothing without it."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_helpers import equal
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from run_helpers import metrics, succeed, summary

from engine.batch import Batch
from engine.data.batches import QuizBatches, TrainingBatches, evaluation_batches, training_rows
from engine.data.encoded import EncodedSplit
from engine.data.encoding import Encoding, kept_key
from engine.data.noise import GOLDEN, Noise, Reader, _mixed
from engine.data.splits import content_hash
from engine.data.words import _number, special_ids, words_of
from engine.embedded import generate
from engine.embedded.models import train_bpe, train_wordpiece
from engine.errors import UserError
from engine.models.network import Encoder, Network

CPU = torch.device("cpu")
PIECES = [
    "the", "soup", "un", "believ", "able", "a", "É", "中", "?", "!", ",", "-", "'s", " ", "  ", "\t", "[MASK]", "[SEP]",
    "<mask>", "</s>", "[UNK]", "quzzz", "42", "motel",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=25).map("".join).filter(str.strip)


@pytest.fixture(scope="module")
def tokenizers():
    texts = [text for text, _ in generate(300, seed=3)]
    return {"wordpiece": train_wordpiece(texts), "bpe": train_bpe(texts)}


@pytest.fixture(scope="module")
def scene(tokenizers, tmp_path_factory):
    """A split of 60 examples in two encodings, and how to make noise for it."""
    texts = [text for text, _ in generate(200, seed=5)]
    texts = [" ".join(texts[3 * i : 3 * i + 1 + i % 3]) for i in range(60)]
    return made(texts, tokenizers.values(), tmp_path_factory.mktemp("tokens"))


def made(texts, tokenizers, cache, pairs=None, max_length=64):
    columns = {"text": texts, "label": [i % 2 for i in range(len(texts))]} | ({"pair": pairs} if pairs else {})
    dataset = Dataset.from_dict(columns)
    encodings, content = [Encoding.of(t, max_length) for t in tokenizers], content_hash(dataset)
    split = EncodedSplit(dataset, encodings, content, cache, 4, batch_size=8)

    def noisy(teacher=0.0, student=0.0, kind="mask", seed=0, teachers=(0,), students=(0,)):
        keys = [[encodings[i].key for i in group] for group in (teachers, students)]
        readers = {
            role: Reader(frozenset(k), p)
            for role, k, p in zip(("teacher", "student"), keys, (teacher, student), strict=True)
        }
        return split.with_noise(Noise(dataset, encodings, content, cache, readers, kind, seed))

    return SimpleNamespace(split=split, dataset=dataset, encodings=encodings, content=content, cache=cache, noisy=noisy,
                           keys=[e.key for e in encodings], texts=texts)  # fmt: skip


def ids(batch: Batch, key: str):
    return batch.inputs[key]["input_ids"]


# Words


def test_words_are_the_tokenizers(tokenizers, tmp_path):
    """By hand: pieces share a number, the second text goes on counting, markers have none, nor has what a text spells so."""
    data = Dataset.from_dict({"text": ["the [MASK] unbelievable, soup 中"], "pair": ["the soup"], "label": [0]})
    encoding = Encoding.of(tokenizers["wordpiece"], 64)
    words = words_of(data, encoding, content_hash(data), tmp_path).tolist()
    tokens = tokenizers["wordpiece"].convert_ids_to_tokens(next(encoding.tokenized(data))["input_ids"][0])
    starts = [i for i, token in enumerate(tokens) if not token.startswith("##")]
    heads = " ".join(tokens[i] for i in starts)
    assert heads == f"[CLS] the [MASK] {tokens[3]} , soup [UNK] [SEP] the soup [SEP]" and "unbelievable".startswith(
        tokens[3]
    )
    assert [words[i] for i in starts] == [-1, 0, -1, 1, 2, 3, -1, -1, 5, 6, -1]
    inside = words[starts[3] : starts[4]]
    assert len(inside) >= 2 and set(inside) == {1} and len(words) == len(tokens)


def test_words_are_kept_beside_the_tokens(scene, monkeypatch):
    encoding = scene.encodings[0]
    first = words_of(scene.dataset, encoding, scene.content, scene.cache)
    assert first.dtype == np.int32
    folders = sorted(folder.name for folder in scene.cache.iterdir())
    tokens = scene.split.tables[0].tokens
    again = words_of(scene.dataset, Encoding(encoding.key, None, 64), scene.content, scene.cache)  # tokenises nothing
    assert np.array_equal(first, again) and len(first) == len(tokens.ids)
    assert kept_key(encoding, scene.content, of="words") in folders


# What is replaced


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(TEXT, min_size=1, max_size=4), pairs=st.booleans(), p=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    kind=st.sampled_from(["mask", "vocabulary"]), which=st.sampled_from(["wordpiece", "bpe"]), epoch=st.integers(0, 5),
    max_length=st.sampled_from([8, 64]),
)  # fmt: skip
def test_whole_words_and_never_a_special_token(
    tokenizers, tmp_path_factory, texts, pairs, p, kind, which, epoch, max_length
):
    """Against the tokenizer's own words: each is replaced as a whole or not at all, everything else is as it was."""
    tokenizer = tokenizers[which]
    cache = tmp_path_factory.mktemp("words")
    one = made(texts, [tokenizer], cache, texts[::-1] if pairs else None, max_length)
    split, key, rows = one.noisy(student=p, kind=kind), one.keys[0], list(range(len(texts)))
    clean, batch = one.split.batch(rows), split.batch(rows, epoch)
    assert ids(batch, key).equal(ids(clean, key))
    if p == 0:
        assert batch.inputs.keys() == clean.inputs.keys() and not list(cache.glob("*-words"))
        return
    noised, special = batch.inputs[f"{key}/student"], special_ids(tokenizer)
    masked = one.noisy(student=p).batch(rows, epoch).inputs[f"{key}/student"]["input_ids"] != ids(clean, key)
    assert not ((noised["input_ids"] != ids(clean, key)) & ~masked).any()  # either kind replaces the same words
    assert all(noised[name].equal(clean.inputs[key][name]) for name in noised if name != "input_ids")
    assert noised.keys() == clean.inputs[key].keys()
    own = tokenizer(texts, texts[::-1] if pairs else None, truncation=True, max_length=max_length)
    for row in rows:
        before, after = ids(clean, key)[row].tolist(), noised["input_ids"][row].tolist()
        length = len(own["input_ids"][row])
        assert after[length:] == before[length:]
        words: dict = {}
        for i, source in enumerate(zip(own.sequence_ids(row), own.word_ids(row), strict=True)):
            if before[i] in special or source[1] is None:
                assert after[i] == before[i]
            else:
                words.setdefault(source, []).append(i)
        for places in words.values():
            changed = [after[i] != before[i] for i in places]
            if kind == "mask":
                # where a text spells a special token, the tokenizer numbers it as it does the word behind it
                assert all(changed) or not any(changed)
                assert all(after[i] == tokenizer.mask_token_id for i in places if after[i] != before[i])
            assert not {after[i] for i in places} & special or kind == "mask"
            unknown = {i for i, token in enumerate(before) if token == tokenizer.unk_token_id}
            whole = not unknown & set(range(places[0], places[-1] + 1))
            if p == 1 and kind == "mask" and whole:
                assert all(changed)


def test_an_unknown_piece_keeps_its_word():
    """A vocabulary may know a part of a word: replaced in part it would be no word, and <unk> is a special token."""
    sources = [(None, None), (0, 0), (0, 0), (0, 0), (0, 1), (None, None)]
    assert _number([0, 9, 3, 9, 9, 2], iter(sources), {0, 2}, 3) == [-1, -1, -1, -1, 1, -1]
    assert _number([0, 9, 7, 9, 9, 2], iter(sources), {0, 2}, 3) == [-1, 0, 0, 0, 1, -1]
    assert _number([0, 9, 2, 9, 9, 2], iter(sources), {0, 2}, None) == [-1, 0, -1, 1, 2, -1]


def test_the_share_of_words_is_the_probability(scene):
    """Over 60 epochs of about 1,500 words: within four standard deviations, each word by itself, each token as likely."""
    key, p, rows = scene.keys[0], 0.3, list(range(60))
    words = words_of(scene.dataset, scene.encodings[0], scene.content, scene.cache)
    split = scene.noisy(student=p)
    per_epoch = []
    for epoch in range(60):
        batch = split.batch(rows, epoch)
        changed = ids(batch, f"{key}/student") != ids(batch, key)
        first = np.concatenate([np.diff(words[a:b], prepend=-1) > 0 for a, b in zip(
            scene.split.tables[0]._starts[:-1], scene.split.tables[0]._starts[1:], strict=True)])  # fmt: skip
        per_epoch.append(changed[batch.inputs[key]["attention_mask"].bool()].numpy()[first])
    each = np.array(per_epoch)
    assert abs(each.mean() - p) < 4 * (p * (1 - p) / each.size) ** 0.5
    assert abs(each.mean(0) - p).max() < 5.5 * (p * (1 - p) / 60) ** 0.5  # of no word in particular
    neighbours = np.corrcoef(each[:, :-1].ravel(), each[:, 1:].ravel())[0, 1]
    epochs = np.corrcoef(each[:-1].ravel(), each[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / each.size**0.5 and abs(epochs) < 5 / each.size**0.5


def test_replacements_are_all_over_the_vocabulary(scene):
    key, tokenizer = scene.keys[1], scene.encodings[1].tokenizer
    split = scene.noisy(student=1.0, kind="vocabulary", students=(1,))
    batches = [split.batch(list(range(60)), epoch) for epoch in range(40)]
    found = torch.cat([ids(batch, f"{key}/student").flatten() for batch in batches])
    before = torch.cat([ids(batch, key).flatten() for batch in batches])
    special = torch.tensor(sorted(special_ids(tokenizer)))
    assert torch.equal(found[torch.isin(before, special)], before[torch.isin(before, special)])
    found = found[~torch.isin(before, special)]
    assert not torch.isin(found, special).any()
    allowed = len(tokenizer) - len(special)
    counts = torch.bincount(found, minlength=len(tokenizer)).double()
    counts = counts[torch.tensor([i for i in range(len(tokenizer)) if i not in special])]
    assert (counts > 0).sum() == allowed  # 60,000 draws of 1,200
    expected = len(found) / allowed
    assert ((counts - expected) ** 2 / expected).sum() < allowed + 6 * (2 * allowed) ** 0.5  # chi-squared


def test_what_a_word_becomes_says_nothing_of_which_words_are_replaced(scene):
    """A random number serves once: the token at place i does not get what decided about word i."""
    key, split, low, decided = scene.keys[0], scene.noisy(student=0.5, kind="vocabulary"), [], []
    words = words_of(scene.dataset, scene.encodings[0], scene.content, scene.cache)
    for epoch in range(8):
        batch = split.batch(list(range(60)), epoch)
        for row, (start, end) in enumerate(pairwise(scene.split.tables[0]._starts)):
            after = ids(batch, f"{key}/student")[row].tolist()
            changed = [a != b for a, b in zip(after, ids(batch, key)[row].tolist(), strict=True)]
            of_word = dict(zip(words[start:end].tolist(), changed, strict=False))
            places = [i for i in range(end - start) if changed[i] and i in of_word]
            low += [after[i] < len(scene.encodings[0].tokenizer) / 2 for i in places]
            decided += [of_word[i] for i in places]
    assert abs(np.corrcoef(low, decided)[0, 1]) < 5 / len(low) ** 0.5


# A function of seed, epoch, row and encoding


def test_the_numbers_are_those_of_splitmix64():
    """The published first outputs for the seed 1234567."""
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * GOLDEN
    assert _mixed(states).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["mask", "vocabulary"])
def test_what_a_row_gets_does_not_depend_on_its_batch(scene, kind):
    split, key = scene.noisy(student=0.4, kind=kind, seed=3), f"{scene.keys[0]}/student"
    whole = split.batch(list(range(60)), 2)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for rows in ([5], [44, 5, 17], [17, 5]):
        part = split.batch(rows, 2)
        width = min(ids(part, key).shape[1], ids(whole, key).shape[1])
        assert all(torch.equal(ids(part, key)[i, :width], ids(whole, key)[row, :width]) for i, row in enumerate(rows))
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


@pytest.mark.parametrize("kind", ["mask", "vocabulary"])
def test_another_epoch_seed_or_encoding_is_other_noise(scene, kind):
    rows, key = list(range(60)), f"{scene.keys[0]}/student"
    found = [
        ids(scene.noisy(student=0.4, kind=kind, seed=seed).batch(rows, epoch), key)
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    again = scene.noisy(student=0.4, kind=kind, seed=1).batch(rows, 2)
    assert torch.equal(ids(again, key), found[-1])
    twins = made([scene.texts[0]] * 2, [scene.encodings[0].tokenizer], scene.cache)  # one text, two rows
    both = ids(twins.noisy(student=0.5, kind=kind).batch([0, 1], 0), f"{twins.keys[0]}/student")
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("kind", ["mask", "vocabulary"])
def test_teacher_and_student(scene, kind):
    """The same words and replacements at one probability, some of them at a smaller one; each reads its own encoding."""
    rows, key = list(range(60)), scene.keys[0]
    same = scene.noisy(0.3, 0.3, kind).batch(rows, 1)
    assert torch.equal(ids(same, f"{key}/teacher"), ids(same, f"{key}/student"))
    assert not torch.equal(ids(same, f"{key}/teacher"), ids(same, key))
    nested = scene.noisy(0.6, 0.3, kind).batch(rows, 1)
    assert torch.equal(ids(nested, f"{key}/student"), ids(same, f"{key}/student"))
    more, less = (ids(nested, f"{key}/{role}") != ids(nested, key) for role in ("teacher", "student"))
    assert (more | ~less).all() and more.sum() > less.sum()
    assert torch.equal(ids(nested, f"{key}/teacher")[less], ids(nested, f"{key}/student")[less])
    apart = scene.noisy(0.3, 0.3, kind, teachers=(0, 1), students=(1,)).batch(rows, 1)
    other = scene.keys[1]
    assert set(apart.inputs) == {key, other, f"{key}/teacher", f"{other}/teacher", f"{other}/student"}
    assert set(scene.noisy(0.3, 0.0, kind).batch(rows, 1).inputs) == {key, other, f"{key}/teacher"}


def test_only_training_batches_have_noise(scene):
    split = scene.noisy(0.5, 0.5)
    for rows, batch in evaluation_batches(split, 16):
        assert equal(batch, scene.split.batch(rows))
    quizzes = (QuizBatches(s, 8, 2, 0, CPU)(0) for s in (split, scene.split))
    assert all(equal(a, b) for a, b in zip(*quizzes, strict=True))
    for a, b in zip(
        TrainingBatches(scene.split, 8, 0, CPU).epoch(1), training_rows(scene.split.widths, 8, 0, 1), strict=True
    ):
        assert equal(a, scene.split.batch(b))  # without noise there is nothing beside an encoding
    only = split.only({scene.keys[1]})
    assert set(only.batch([0, 1], 0).inputs) == {scene.keys[1]}  # nobody of a role reads it


def test_an_epoch_has_its_own_noise_from_any_start(scene):
    batches = TrainingBatches(scene.noisy(0.2, 0.5, "vocabulary"), 8, 3, CPU)
    for epoch, start in ((0, 0), (1, 5)):
        rows = training_rows(scene.split.widths, 8, 3, epoch)[start:]
        assert all(
            equal(a, batches.split.batch(r, epoch)) for a, r in zip(batches.epoch(epoch, start), rows, strict=True)
        )


# Networks


class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=input_ids.float() * self.one)


def test_a_network_reads_the_version_of_its_role():
    def given(value):
        return {"input_ids": torch.full((2, 3), value), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}

    batch = Batch(torch.zeros(2), {"a": given(1), "a/teacher": given(2), "b": given(3)})
    for encoding, role, value in (("a", "teacher", 2), ("a", "student", 1), ("a", None, 1), ("b", "teacher", 3)):
        network = Encoder("x", Sum(), encoding)
        assert network.role is None
        network.role = role
        assert (network(batch).logits == value).all()
    assert Network(Sum(), lambda m, b: m(**b.inputs["a"]))(batch).logits.sum() == 6


def test_masks_of_a_tokenizer_without_one(scene):
    tokenizer = SimpleNamespace(mask_token_id=None, name_or_path="gpt")
    reader = {"student": Reader(frozenset(["k"]), 0.5)}
    with pytest.raises(UserError, match="mask token, which the tokenizer of gpt has not; use --noise-kind vocabulary"):
        Noise(scene.dataset, [Encoding("k", tokenizer, 64)], scene.content, scene.cache, reader, "mask", 0)


# Whole runs


def record(monkeypatch):
    """What each training step reads: (role, whether it differs from the clean encoding)."""
    seen, call = [], Encoder.__call__

    def called(self, batch, *args, **kwargs):
        seen.append((self.role, self.module.training, f"{self.encoding}/{self.role}" in batch.inputs))
        return call(self, batch, *args, **kwargs)

    monkeypatch.setattr(Encoder, "__call__", called)
    return seen


def test_a_run_with_noise(data, tmp_path, monkeypatch, capsys):
    """The distillation's batches alone have it: not the teachers' preparation, the warm-up, the quiz, the validations."""
    settings = {"method": "metadistil", "student_warmup_epochs": 1, "log_steps": 1}
    clean = succeed(data, tmp_path / "clean", **settings)
    seen = record(monkeypatch)
    noisy = succeed(data, tmp_path / "noisy", noise_teacher=0.2, noise_student=0.4, **settings)
    said = " ".join(capsys.readouterr().out.split())
    assert "20 % of the teacher's words and 40 % of the student's words are replaced" in said
    assert {role for role, _, noised in seen if noised} == {"teacher", "student"}

    def losses(run, phase):
        return [row["loss"] for row in metrics(run) if row["phase"] == phase and "loss" in row]

    assert losses(clean, "warm up") == losses(noisy, "warm up") != []
    assert losses(clean, "metadistil") != losses(noisy, "metadistil")
    prepared = [[t["prepared"]["validation"] for t in summary(run)["teachers"]] for run in (clean, noisy)]
    assert prepared[0] == prepared[1]


def test_finetuning_reads_noise_where_it_trains(data, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run.job.probe", lambda setup: None)  # which trains nothing
    seen = record(monkeypatch)
    succeed(data, tmp_path / "finetune", method="finetune", noise_student=0.2, noise_kind="vocabulary")
    assert {(training, noised) for _, training, noised in seen} == {(True, True), (False, False)}
