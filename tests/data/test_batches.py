"""Token ids equal the tokenizer's own, batches hold every row, and their order is a function of seed and position."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_helpers import equal
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from run_helpers import succeed, summary

from engine.batch import Batch
from engine.data.batches import QuizBatches, evaluation_batches, training_rows
from engine.data.buckets import Buckets
from engine.data.encoded import EncodedSplit, EncodedSplits
from engine.data.encoding import Encoding, encode
from engine.data.splits import Splits, content_hash
from engine.data.token_files import Tokens
from engine.data.token_table import TokenTable
from engine.embedded import generate
from engine.embedded.models import train_bpe, train_wordpiece
from engine.losses.objectives import Objective
from engine.meta.micro_batches import parts as cut_batch

ROWS, CPU = 45, torch.device("cpu")
PROPERTY = settings(max_examples=50, deadline=None, derandomize=True, database=None)


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
    columns = {"text": texts, "label": [i + 0.5 for i in range(ROWS)], "domain": [i % 3 for i in range(ROWS)]}
    return Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def split(dataset, tokenizers, tmp_path_factory):
    encodings = [Encoding.of(t, 64) for t in tokenizers.values()]
    return EncodedSplit(dataset, encodings, content_hash(dataset), tmp_path_factory.mktemp("tokens"), batch_size=8)


def rows_of(batch):
    return (batch.labels - 0.5).long().tolist()


# Tokens


@pytest.mark.parametrize("max_length", [64, 20])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_tokens_are_the_tokenizers_own(kind, pair, max_length, texts, tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.encoding.TOKENIZED_AT_ONCE", 7)
    columns = {"text": texts, "label": [0] * ROWS} | ({"pair": texts[::-1]} if pair else {})
    data = Dataset.from_dict(columns)
    tokens = encode(data, Encoding.of(tokenizers[kind], max_length), content_hash(data), tmp_path)
    own = tokenizers[kind](texts, texts[::-1] if pair else None, truncation=True, max_length=max_length,
                           return_token_type_ids=tokens.types is not None)  # fmt: skip
    assert [tokens.ids[a:b].tolist() for a, b in pairwise(tokens.offsets)] == own["input_ids"]
    if tokens.types is not None:
        assert [tokens.types[a:b].tolist() for a, b in pairwise(tokens.offsets)] == own["token_type_ids"]
    assert (max(map(len, own["input_ids"])) == 20) == (max_length == 20)
    assert not pair or kind == "bpe" or tokens.types.max() == 1


def table_of(examples, training=None, max_length=40, buckets=3, batch_size=1, typed=True, **layout):
    """A table of examples whose tokens are numbered through, the types being their last digits."""
    offsets = np.concatenate([[0], np.cumsum(examples)]).astype(np.int64)
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    encoding = Encoding("numbers", SimpleNamespace(pad_token_id=-7), max_length, **layout)
    tokens = Tokens(ids, offsets, (ids % 10).astype(np.int8) if typed else None)
    return TokenTable(encoding, tokens, buckets, batch_size, None if training is None else np.array(training))


@PROPERTY
@given(
    examples=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    training=st.none() | st.lists(st.integers(1, 40), min_size=1, max_size=12), buckets=st.integers(1, 5),
    batch_size=st.integers(1, 3), typed=st.booleans(), pick=st.lists(st.integers(0, 11), min_size=1, max_size=12),
    left=st.booleans(), fixed=st.booleans(),
)  # fmt: skip
def test_padding_against_a_loop(examples, training, buckets, batch_size, typed, pick, left, fixed):
    layout = {"padding": "left" if left else "right", "fixed": fixed}
    table = table_of(examples, training, 40, buckets, batch_size, typed, **layout)
    rows = np.array([p % len(examples) for p in pick])
    got = table.pad(rows)
    longest = max(examples[r] for r in rows)
    held = [w for w in table.buckets.widths if w >= longest]
    width = 40 if fixed else min(held) if held else -(-longest // 8) * 8
    planned = Buckets.of(np.array(examples if training is None else training), 40, buckets, batch_size)
    assert table.buckets.widths.tolist() == ([40] if fixed else planned.widths.tolist())
    assert got.keys() == {"input_ids", "attention_mask"} | ({"token_type_ids"} if typed else set())
    for i, r in enumerate(rows):
        ids = table.tokens.ids[sum(examples[:r]) : sum(examples[: r + 1])].tolist()
        rest, types = width - len(ids), [x % 10 for x in ids]
        ids, mask, types, beside = (
            [padding] * rest + real if left else real + [padding] * rest
            for real, padding in ((ids, -7), ([1] * len(ids), 0), (types, 0), (ids, -1))
        )
        assert got["input_ids"][i].tolist() == ids
        assert got["attention_mask"][i].tolist() == mask
        assert not typed or got["token_type_ids"][i].tolist() == types
        assert table.beside(table.tokens.ids, rows, -1)[i].tolist() == beside
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in got.values())


def test_padding_waste(dataset, tokenizers, tmp_path):
    encodings = [Encoding.of(tokenizer, 64) for tokenizer in tokenizers.values()]
    split = EncodedSplit(dataset, encodings, content_hash(dataset), tmp_path, buckets=2)
    batches = [[0, 4, 9], [1], [2, 3]]
    real = padded = 0
    for rows in batches:
        for inputs in split.batch(rows).inputs.values():
            real += inputs["attention_mask"].sum().item()
            padded += inputs["attention_mask"].numel()
    assert split.padding_waste(batches) == pytest.approx(1 - real / padded, abs=1e-12)
    assert 0 < split.padding_waste(batches) < 1


class Untouchable:
    def __call__(self, *args, **kwargs):
        raise AssertionError("tokenised again")


def test_tokens_are_reused(dataset, tokenizers, tmp_path):
    encoding, content = Encoding.of(tokenizers["wordpiece"], 64), content_hash(dataset)
    first = encode(dataset, encoding, content, tmp_path)
    (folder,) = tmp_path.iterdir()
    files = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in [folder, *folder.iterdir()]}
    again = encode(dataset, Encoding(encoding.key, Untouchable(), 64), content, tmp_path)
    assert np.array_equal(again.ids, first.ids) and np.array_equal(again.offsets, first.offsets)
    assert {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in [folder, *folder.iterdir()]} == files
    assert list(tmp_path.iterdir()) == [folder]  # nothing of what `datasets` makes on the way
    other = dataset.select(range(10))
    with pytest.raises(AssertionError, match="tokenised again"):
        encode(other, Encoding(encoding.key, Untouchable(), 64), content_hash(other), tmp_path)


def test_encodings_are_told_apart_by_content(texts, tokenizers, dataset, tmp_path):
    wordpiece, bpe = tokenizers.values()
    other_vocabulary = train_wordpiece(texts[:5])
    keys = {Encoding.of(t, n).key for t, n in [(wordpiece, 64), (wordpiece, 32), (bpe, 64), (other_vocabulary, 64)]}
    assert len(keys) == 4
    encoded = [encode(dataset, Encoding.of(t, 64), content_hash(dataset), tmp_path) for t in (wordpiece, bpe)]
    assert encoded[0].ids.tolist() != encoded[1].ids.tolist()
    assert len(list(tmp_path.iterdir())) == 2
    used = train_wordpiece(texts)
    before = Encoding.of(used, 64).key
    used(["a camera"] * 2, truncation=True, max_length=4, padding=True)
    assert before == Encoding.of(used, 64).key == Encoding.of(wordpiece, 64).key


OTHER_TOKENIZERS = {
    "truncation_side": "left", "padding_side": "left", "_pad_token_type_id": 3, "split_special_tokens": True,
    "model_input_names": ["input_ids", "attention_mask"],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_tokenizers_that_differ_outside_their_backend_share_nothing(name, texts, dataset, tmp_path):
    plain, other = train_wordpiece(texts), train_wordpiece(texts)
    setattr(other, name, OTHER_TOKENIZERS[name])
    encodings = [Encoding.of(tokenizer, 4) for tokenizer in (plain, other)]
    assert encodings[0].key != encodings[1].key
    if name == "truncation_side":
        right, left = (encode(dataset, e, content_hash(dataset), tmp_path) for e in encodings)
        assert left.ids.tolist() == [i for text in texts for i in other(text, truncation=True, max_length=4).input_ids]
        assert right.ids.tolist() != left.ids.tolist()


def test_models_read_their_own_encoding_of_the_same_rows(split, texts, tokenizers):
    batch = split.batch([7, 3])
    assert rows_of(batch) == [7, 3] and batch.labels.dtype == torch.float32
    (wordpiece, bpe) = batch.inputs.values()
    for inputs, tokenizer in zip((wordpiece, bpe), tokenizers.values(), strict=True):
        decoded = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        assert ["".join(d.split()).lower() for d in decoded] == ["".join(texts[r].split()).lower() for r in (7, 3)]


def test_every_split_has_the_widths_of_the_first_training_sample(texts, tokenizers, tmp_path):
    def part(rows):
        return Dataset.from_dict({"text": [texts[r] for r in rows], "label": [r % 2 for r in rows]})

    short, long = [r for r in range(ROWS) if r % 5 == 0], [r for r in range(ROWS) if r % 5 > 0]
    splits = Splits(None, [part(short), part(long)], part(long[:9]), part(long[9:]), part(long), "local")
    encodings = [Encoding.of(tokenizer, 64) for tokenizer in tokenizers.values()]
    encoded = EncodedSplits.of(splits, encodings, tmp_path, 4, batch_size=2)
    assert encoded.quiz.labels.dtype == torch.int64
    widths = [[table.buckets.widths.tolist() for table in split.tables]
              for split in (*encoded.train, encoded.quiz, encoded.validation, encoded.test)]  # fmt: skip
    assert widths[0] == widths[2] == widths[3] == widths[4] != widths[1]
    assert all(len(of_table) <= 4 for of_split in widths for of_table in of_split)
    assert all(of_split[0][-1] == split.tables[0].lengths.max() for of_split, split in
               zip(widths, encoded.train, strict=False))  # fmt: skip


def test_rows_are_grouped_by_their_longest_encoding(split):
    joint = np.maximum(*(table.lengths for table in split.tables))
    assert split.lengths.tolist() == joint.tolist()
    assert split.widths.tolist() == Buckets.of(joint, 64, 16, 8)(joint).tolist()
    for table in split.tables:
        part = split.only({table.encoding.key})
        assert part.tables == [table] and part.lengths.tolist() == table.lengths.tolist()
        assert part.widths.tolist() == table.buckets(table.lengths).tolist()
        kept = split.with_answers([[np.zeros((ROWS, 2), np.float32)]]).only({table.encoding.key})
        assert kept.tables == [table] and kept.widths.tolist() == split.widths.tolist()


# Columns


def test_batches_carry_columns(split, dataset, tmp_path):
    assert split.columns["domain"].dtype == torch.int64
    weight = np.arange(ROWS) / 2
    more = split.with_columns({"weight": weight, "hard": np.arange(ROWS) % 5 == 0})
    assert "weight" not in split.columns and split.batch([3]).columns.keys() == {"domain"}
    batch = more.only({split.tables[1].encoding.key}).batch([7, 3, 20])
    assert batch.columns["domain"].tolist() == [1, 0, 2]
    assert torch.equal(batch.columns["weight"], torch.tensor([3.5, 1.5, 10.0]))
    assert torch.equal(batch.columns["hard"], torch.tensor([0, 0, 1]))
    assert more.with_columns({"weight": weight + 1}).batch([0]).columns["weight"].tolist() == [1]
    plain = dataset.remove_columns("domain")
    encodings = [table.encoding for table in split.tables]
    assert EncodedSplit(plain, encodings, content_hash(plain), tmp_path).batch([0, 1]).columns == {}
    with pytest.raises(AssertionError):
        split.with_columns({"short": np.arange(ROWS - 1)})


def test_columns_go_where_the_batch_goes(split):
    batch = split.with_answers([[np.ones((ROWS, 2), np.float32)]]).batch(list(range(10)))
    assert batch.to(torch.device("meta")).columns["domain"].is_meta
    found = cut_batch(batch, Objective(), 4)
    assert torch.cat([part.batch.columns["domain"] for part in found]).tolist() == [i % 3 for i in range(10)]
    leaves, spec = torch.utils._pytree.tree_flatten(batch)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, Batch) and torch.equal(again.columns["domain"], batch.columns["domain"])
    assert spec != torch.utils._pytree.tree_flatten(Batch(batch.labels, batch.inputs, batch.answers))[1]


# Order


@PROPERTY
@given(
    widths=st.lists(st.sampled_from([4, 7, 11, 30]), min_size=1, max_size=120), size=st.integers(1, 25),
    seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 50),
)  # fmt: skip
def test_an_epoch(widths, size, seed, epoch):
    """Every row once, in the fewest batches; one bucket a batch but where what is left over goes up."""
    batches = training_rows(np.array(widths), size, seed, epoch)
    assert sorted(r for b in batches for r in b) == list(range(len(widths)))
    assert len(batches) == -(-len(widths) // size)
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)  # one is smaller at most
    assert all(isinstance(r, int) for b in batches for r in b)
    assert batches == training_rows(np.array(widths), size, seed, epoch)
    in_order = sorted([sorted(widths[r] for r in b) for b in batches], key=lambda b: (b, len(b)))
    assert all(a[-1] <= b[0] for a, b in pairwise(in_order))  # what goes up goes to the next bucket that has a row
    assert all(len(b) == size for b in in_order if b[-1] < max(widths))  # what is left at the end is of the widest


def test_order_is_a_function_of_seed_and_epoch():
    widths = np.random.default_rng(0).integers(3, 9, 300)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    orders = [training_rows(widths, 8, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert orders == [training_rows(widths, 8, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


def test_within_a_bucket_and_among_batches_all_orders_are_alike():
    """Over 400 epochs: a row meets every other of its bucket, and is anywhere in the epoch."""
    widths, met, places = np.repeat([4, 9], 16), np.zeros((32, 32), int), np.zeros((32, 8), int)
    for epoch in range(400):
        for place, rows in enumerate(training_rows(widths, 4, 0, epoch)):
            met[np.ix_(rows, rows)] += 1
            places[rows, place] += 1
    others = met[:16, :16][~np.eye(16, dtype=bool)]  # 400 epochs x 3 others of 15: 80 times, a deviation of 8
    assert abs(others - 80).max() < 45 and not met[:16, 16:].any()
    assert abs(places - 50).max() < 35  # 400 epochs in 8 places, a deviation of 7


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
    (whole,) = QuizBatches(split, batch_size=100, count=1, seed=0, device=CPU)(0)
    assert sorted(rows_of(whole)) == list(range(ROWS))


def test_quiz_batches_are_of_like_length_and_draw_all_alike(split):
    """Few roundings of length in a batch but for those that go round; over many rounds no example is preferred."""
    quiz = QuizBatches(split, batch_size=8, count=1, seed=0, device=CPU)
    drawn = [rows_of(quiz(r)[0]) for r in range(900)]
    counts = np.bincount(np.concatenate(drawn), minlength=ROWS)
    assert abs(counts / counts.mean() - 1).max() < 0.35  # 160 draws each, a deviation of 12
    spread = np.median([np.ptp(split.lengths[rows]) for rows in drawn])
    random = np.random.default_rng(0)
    assert spread < 0.6 * np.median([np.ptp(split.lengths[random.permutation(ROWS)[:8]]) for _ in range(900)])


def test_evaluation_takes_every_row_once_longest_first(split):
    seen, lengths = [], []
    for rows, batch in evaluation_batches(split, 8):
        assert rows_of(batch) == rows
        assert equal(batch, split.batch(rows))
        seen += rows
        lengths += split.lengths[rows].tolist()
    assert sorted(seen) == list(range(ROWS))
    assert lengths == sorted(lengths, reverse=True)


def test_length_buckets_reach_the_batches_and_are_part_of_what_a_teacher_is(tmp_path, data):
    runs = [succeed(data, tmp_path / str(n), method="kd", length_buckets=n) for n in (1, 16)]
    one, many = map(summary, runs)
    assert one["padding_waste"] > many["padding_waste"] > 0
    assert [found["teachers"][0]["origin"] for found in (one, many)] == ["fine-tuned", "fine-tuned"]
