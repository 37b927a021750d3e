"""Token ids equal the tokenizer's own, batches hold every row, and their order is a function of seed and position."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from engine.data.batches import (
    WINDOW,
    LengthGroupedBatches,
    QuizBatches,
    evaluation_batches,
    training_loader,
)
from engine.data.encode import EncodedSplit, Encoding, TokenTable, encode
from engine.data.splits import content_hash
from engine.embedded import build, generate
from engine.embedded.models import train_bpe, train_wordpiece

ROWS, CPU = 45, torch.device("cpu")


@pytest.fixture(scope="module")
def texts():
    """Of very different length: one sentence up to five."""
    sentences = [text for text, _ in generate(5 * ROWS, seed=3)]
    return [" ".join(sentences[5 * i : 5 * i + 1 + i % 5]) for i in range(ROWS)]


@pytest.fixture(scope="module")
def tokenizers(texts):
    return {"wordpiece": train_wordpiece(texts), "bpe": train_bpe(texts)}


@pytest.fixture(scope="module")
def dataset(texts):
    """The label names the row."""
    return Dataset.from_dict({"text": texts, "label": [i + 0.5 for i in range(ROWS)]})


@pytest.fixture(scope="module")
def split(dataset, tokenizers, tmp_path_factory):
    encodings = [Encoding.of(t, 64) for t in tokenizers.values()]
    return EncodedSplit(dataset, encodings, content_hash(dataset), tmp_path_factory.mktemp("tokens"))


def rows_of(batch):
    return (batch.labels - 0.5).long().tolist()


def equal(a, b):
    return (
        torch.equal(a.labels, b.labels)
        and a.inputs.keys() == b.inputs.keys()
        and all(torch.equal(t, b.inputs[k][n]) for k, v in a.inputs.items() for n, t in v.items())
    )


# Tokens


@pytest.mark.parametrize("max_length", [64, 20])  # 20 cuts, and is no multiple of 8
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_padded_rows_equal_the_tokenizers_own(kind, pair, max_length, texts, tokenizers, tmp_path):
    tokenizer = tokenizers[kind]
    columns = {"text": texts, "label": [0] * ROWS} | ({"pair": texts[::-1]} if pair else {})
    data = Dataset.from_dict(columns)
    encoding = Encoding.of(tokenizer, max_length)
    table = TokenTable(encoding, encode(data, encoding, content_hash(data), tmp_path))
    for rows in ([0], [4, 0, 9], list(range(ROWS))):
        got = table.pad(np.array(rows))
        expected = tokenizer(
            [texts[r] for r in rows], [texts[::-1][r] for r in rows] if pair else None, truncation=True,
            max_length=max_length, padding="longest", return_token_type_ids="token_type_ids" in got, return_tensors="pt",
        )  # fmt: skip
        longest = expected["input_ids"].shape[1]
        width = min(-(-longest // 8) * 8, max_length)
        for name, tensor in got.items():
            filler = {"input_ids": tokenizer.pad_token_id}.get(name, 0)
            wider = torch.nn.functional.pad(expected[name], (0, width - longest), value=filler)
            assert tensor.dtype == torch.int64 and torch.equal(tensor, wider), name
    assert max_length == 64 or longest == 20
    assert not (pair and kind == "wordpiece") or got["token_type_ids"].max() == 1


def test_padding_waste(split):
    batches = [[0, 4, 9], [1], [2, 3]]
    real = padded = 0
    for rows in batches:
        for inputs in split.batch(rows).inputs.values():
            real += inputs["attention_mask"].sum().item()
            padded += inputs["attention_mask"].numel()
    assert split.padding_waste(batches) == pytest.approx(1 - real / padded, abs=1e-12)
    assert 0 < split.padding_waste(batches) < 1


def test_labels_have_the_dtype_of_their_kind(split, dataset, tokenizers, tmp_path):
    assert split.labels.dtype == torch.float32
    ids = dataset.remove_columns("label").add_column("label", [i % 3 for i in range(ROWS)])
    encoding = Encoding.of(tokenizers["bpe"], 64)
    assert EncodedSplit(ids, [encoding], content_hash(ids), tmp_path).labels.dtype == torch.int64


class Untouchable:
    def __call__(self, *args, **kwargs):
        raise AssertionError("tokenised again")


def test_tokens_are_reused(dataset, tokenizers, tmp_path):
    encoding, content = Encoding.of(tokenizers["wordpiece"], 64), content_hash(dataset)
    first = encode(dataset, encoding, content, tmp_path)
    files = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    again = encode(dataset, Encoding(encoding.key, Untouchable(), 64), content, tmp_path)
    assert again["input_ids"][:] == first["input_ids"][:]
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == files and len(files) == 1
    other = dataset.select(range(10))
    with pytest.raises(AssertionError, match="tokenised again"):
        encode(other, Encoding(encoding.key, Untouchable(), 64), content_hash(other), tmp_path)


def test_the_order_of_rows_is_part_of_their_identity(dataset):
    assert content_hash(dataset) != content_hash(dataset.select(list(range(ROWS))[::-1]))


def test_encodings_are_told_apart_by_content(texts, tokenizers, dataset, tmp_path):
    wordpiece, bpe = tokenizers.values()
    other_vocabulary = train_wordpiece(texts[:5])
    keys = {Encoding.of(t, n).key for t, n in [(wordpiece, 64), (wordpiece, 32), (bpe, 64), (other_vocabulary, 64)]}
    assert len(keys) == 4
    encoded = [encode(dataset, Encoding.of(t, 64), content_hash(dataset), tmp_path) for t in (wordpiece, bpe)]
    assert encoded[0]["input_ids"][:] != encoded[1]["input_ids"][:]
    assert len(list(tmp_path.iterdir())) == 2
    assert Encoding.of(train_wordpiece(texts), 64).key == Encoding.of(train_wordpiece(texts), 64).key


def test_models_read_their_own_encoding_of_the_same_rows(split, texts, tokenizers):
    batch = split.batch([7, 3])
    assert rows_of(batch) == [7, 3]
    (wordpiece, bpe) = batch.inputs.values()
    for inputs, tokenizer in zip((wordpiece, bpe), tokenizers.values(), strict=True):
        decoded = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        assert ["".join(d.split()).lower() for d in decoded] == ["".join(texts[r].split()).lower() for r in (7, 3)]


# Order


@pytest.mark.parametrize(("rows", "size"), [(1, 4), (7, 4), (45, 8), (64, 8), (1000, 7)])
def test_every_row_once_an_epoch(rows, size):
    lengths = np.random.default_rng(0).integers(3, 60, rows)
    batches = list(sampler := LengthGroupedBatches(lengths, size, seed=0))
    assert sorted(r for b in batches for r in b) == list(range(rows))
    assert len(batches) == len(sampler) == -(-rows // size)
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)  # one is smaller at most
    assert all(isinstance(r, int) for b in batches for r in b)


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(3, 60, 300)

    def order(seed, epoch):
        sampler = LengthGroupedBatches(lengths, 8, seed)
        sampler.epoch = epoch
        return list(sampler)

    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert order(1, 2) == order(1, 2)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    sampler = LengthGroupedBatches(lengths, 8, 1)
    assert list(sampler) == list(sampler) == order(1, 0)


def test_batches_are_grouped_by_length_and_not_in_its_order():
    lengths = np.random.default_rng(0).integers(3, 60, 2 * WINDOW * 8)
    batches = list(LengthGroupedBatches(lengths, 8, seed=0))
    spread = [np.ptp(lengths[b]) for b in batches]
    assert np.mean(spread) < 3  # of 57
    means = [lengths[b].mean() for b in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_quiz_batches_are_a_function_of_the_round(split):
    quiz = QuizBatches(split, batch_size=8, count=3, seed=5, device=CPU)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    in_order = [quiz(r) for r in range(4)]
    assert torch.equal(torch.get_rng_state(), state)
    other = QuizBatches(split, batch_size=8, count=3, seed=5, device=CPU)
    for r in (2, 0, 3, 3):
        assert all(equal(a, b) for a, b in zip(other(r), in_order[r], strict=True))
    drawn = [tuple(rows_of(b)) for batches in in_order for b in batches]
    assert len(set(drawn)) == len(drawn) == 12
    assert all(len(set(rows)) == 8 for rows in drawn)  # within a batch no row twice
    assert rows_of(QuizBatches(split, 8, 3, seed=6, device=CPU)(0)[0]) != list(drawn[0])


def test_quiz_batches_are_of_like_length_and_draw_all_alike(split):
    """Few roundings of length in a batch but for those that go round; over many rounds no example is preferred."""
    quiz = QuizBatches(split, batch_size=8, count=1, seed=0, device=CPU)
    drawn = [rows_of(quiz(r)[0]) for r in range(900)]
    counts = np.bincount(np.concatenate(drawn), minlength=ROWS)
    assert abs(counts / counts.mean() - 1).max() < 0.35  # 160 draws each, a deviation of 12
    spread = np.median([np.ptp(split.lengths[rows]) for rows in drawn])
    random = np.random.default_rng(0)
    assert spread < 0.6 * np.median([np.ptp(split.lengths[random.permutation(ROWS)[:8]]) for _ in range(900)])


def test_a_quiz_set_smaller_than_a_batch_is_taken_whole(split):
    for batch in QuizBatches(split, batch_size=100, count=2, seed=0, device=CPU)(0):
        assert sorted(rows_of(batch)) == list(range(ROWS))


def test_the_loader_draws_nothing_from_the_global_random_state(split):
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader = training_loader(split, 8, seed=0, pin=False)
    for epoch in range(2):
        loader.batch_sampler.epoch = epoch
        batches = list(loader)
        loader.state_dict()
        assert [rows_of(b) for b in batches] == list(loader.batch_sampler)
        assert sorted(r for b in batches for r in rows_of(b)) == list(range(ROWS))
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


def three_epochs(loader):
    for epoch in range(3):
        loader.batch_sampler.epoch = epoch
        yield from loader


@pytest.mark.parametrize("taken", [1, 3, 5, 6, 8, 12])  # an epoch has 6: within, on the last batch, in the second
def test_a_loader_resumes_where_it_stood(split, taken):
    loader = training_loader(split, 8, seed=3, pin=False)
    source, whole = three_epochs(loader), list(three_epochs(training_loader(split, 8, seed=3, pin=False)))
    assert len(whole) == 18
    for _ in range(taken):
        next(source)
    saved = json.loads(json.dumps(loader.state_dict()))

    resumed, step, rest = training_loader(split, 8, seed=3, pin=False), taken, []
    resumed.load_state_dict(saved)
    while step < 18:  # as the trainer goes on: the epoch is known by the step alone
        resumed.batch_sampler.epoch = step // 6
        for batch in resumed:
            rest.append(batch)
            step += 1
    assert len(rest) == 18 - taken
    assert all(equal(a, b) for a, b in zip(rest, whole[taken:], strict=True))


def test_evaluation_takes_every_row_once_longest_first(split):
    seen, lengths = [], []
    for rows, batch in evaluation_batches(split, 8):
        assert rows_of(batch) == rows
        assert equal(batch, split.batch(rows))
        seen += rows
        lengths += split.lengths[rows].tolist()
    assert sorted(seen) == list(range(ROWS))
    assert lengths == sorted(lengths, reverse=True)


def test_an_encodings_identity_survives_the_use_of_its_tokenizer():
    _, tokenizer = build("bert", ["a camera that never fails"], 2, 0)
    before = Encoding.of(tokenizer, 16).key
    tokenizer(["a camera"] * 2, truncation=True, max_length=4, padding=True)
    assert Encoding.of(tokenizer, 16).key == before != Encoding.of(tokenizer, 8).key
