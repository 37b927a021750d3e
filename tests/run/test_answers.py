"""Answers of frozen teachers, kept: what a live teacher says but for rounding, computed once, and whole or not at all."""

import copy
import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from engine.batch import Batch
from engine.data.batches import evaluation_batches, training_rows
from engine.data.buckets import Buckets
from engine.data.encoded import EncodedSplit
from engine.data.encoding import Encoding
from engine.data.splits import content_hash
from engine.embedded import build, generate
from engine.errors import UserError
from engine.models.compiling import CompiledLayers
from engine.models.features import InnerStates
from engine.models.network import Encoder
from engine.run.answers import answers_of
from engine.run.evaluation import EVALUATION_BATCH
from engine.screen.console import Console

ROWS, CPU = 150, torch.device("cpu")
# Largest difference of a logit or a state, of values below 4, that another padding and another batch make: 8 units in the
# last place of float32 and one of bf16, whose results are rounded once more. Seen were 7e-7 and 2^-8.
TOLERANCE = {"fp32": 8 * 2**-22, "bf16": 2**-6}


@pytest.fixture(scope="module")
def texts():
    sentences = [text for text, _ in generate(3 * ROWS, seed=3)]
    return [" ".join(sentences[3 * i : 3 * i + 1 + i % 3]) for i in range(ROWS)]


@pytest.fixture(scope="module")
def split(texts, tmp_path_factory):
    """In two encodings; the second one cuts at 12 tokens, so that most examples are of one length in it."""
    dataset = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(ROWS)]})
    encodings = [Encoding.of(build(alias, texts, 2, 0)[1], n) for alias, n in (("bert", 64), ("roberta", 12))]
    return EncodedSplit(dataset, encodings, content_hash(dataset), tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def built(texts):
    """Logits of about 1, and dropout, which must not show."""
    module, _ = build("bert", texts, 2, 0)
    torch.nn.init.normal_(module.classifier.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    module.dropout.p = 0.5
    return module.train()


class Refused(Exception):
    pass


def refuse(*_):
    raise Refused


@pytest.fixture
def make(split, built):
    """A teacher; with `deaf`, one that is unable to compute anything."""

    def make(precision="fp32", features=(), deaf=False) -> Encoder:
        network = Encoder("bert", copy.deepcopy(built), split.tables[0].encoding.key, precision)
        network.inner = InnerStates(token=features)
        network.flatten()
        if deaf:
            network.module.register_forward_pre_hook(refuse)
        return network

    return make


@pytest.fixture
def keep(split, tmp_path):
    """A teacher's answers, from `tmp_path` where they are there."""
    console = Console(width=200)
    return lambda teacher, content="these examples", split=split: answers_of(
        teacher, split, content, CPU, tmp_path, console
    )


def live(teacher: Encoder, batch: Batch) -> list[torch.Tensor]:
    with torch.no_grad(), teacher.in_mode(train=False):
        return teacher(batch).given()


def same(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    return len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


# What is kept


@pytest.mark.parametrize(("precision", "features"), [("fp32", ()), ("bf16", (1, 3))])
def test_answers_are_the_teachers_own(precision, features, split, make, keep):
    teacher, random = make(precision, features), torch.get_rng_state()
    kept = keep(teacher)
    assert torch.equal(torch.get_rng_state(), random) and teacher.module.training
    assert len(kept) == ROWS and kept.seconds > 0
    assert [a.shape for a in kept.arrays] == [(ROWS, 2), *([(ROWS, 2, 64)] if features else [])]
    assert all(a.dtype == np.float32 and not a.flags.writeable for a in kept.arrays)
    for rows, batch in evaluation_batches(split.only({teacher.encoding}), EVALUATION_BATCH):
        # the same batches: the same bits
        assert same([t.numpy() for t in live(teacher, batch)], [a[rows] for a in kept.arrays])
    largest = 0.0
    for rows in training_rows(split.widths, 16, 0, 0):  # other batches, padded to other lengths
        for one, other in zip(live(teacher, split.batch(rows)), kept.arrays, strict=True):
            largest = max(largest, (one - torch.from_numpy(other[rows])).abs().max().item())
    assert kept.arrays[0].std() > 0.1
    assert 0 < largest < TOLERANCE[precision]


def test_answers_are_computed_once(make, keep, capsys, monkeypatch, tmp_path):
    """Progress is shown where it takes a while."""
    first = keep(make())
    said = capsys.readouterr().out
    assert f"Teacher bert: logits of {ROWS} examples computed in" in said and str(tmp_path) in said
    assert "answers of bert: step" not in said
    (about,) = tmp_path.rglob("about.json")
    about = json.loads(about.read_text())
    assert about["teacher"] == "bert" and about["examples"] == ROWS and about["seconds"] == first.seconds
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
    assert {f.name for f in files} == {"logits.npy", "about.json"}
    again = keep(make(deaf=True))
    assert f"Teacher bert: logits of {ROWS} examples reused" in capsys.readouterr().out
    assert same(first.arrays, again.arrays) and again.seconds == first.seconds
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()} == files
    monkeypatch.setattr("engine.run.answers.SHOWN", 2)
    keep(make(), "many")
    assert "answers of bert: step 3/3" in capsys.readouterr().out


def other_tokens(teacher, table):
    table.encoding, teacher.encoding = replace(table.encoding, key="other"), "other"


CHANGES = {
    "weights": lambda teacher, table: teacher.module.classifier.bias.data.add_(1e-3),
    "precision": lambda teacher, table: setattr(teacher, "precision", "bf16"),
    "features": lambda teacher, table: setattr(teacher, "inner", InnerStates(token=(2,))),
    "layers": lambda teacher, table: setattr(teacher, "compiled", CompiledLayers("eager")),
    "widths": lambda teacher, table: setattr(table, "buckets", Buckets(np.array([32, 64]), 64)),
    "tokens": other_tokens,
}


def test_other_answers_have_another_name(split, make, keep, monkeypatch):
    keep(make(features=(1,)))
    for change in CHANGES.values():
        changed, teacher = copy.copy(split), make(features=(1,), deaf=True)
        changed.tables = [copy.copy(split.tables[0])]
        change(teacher, changed.tables[0])
        with pytest.raises(Refused):
            keep(teacher, split=changed)
    with pytest.raises(Refused):
        keep(make(features=(1,), deaf=True), "other examples")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(Refused):
        keep(make(features=(1,), deaf=True))


DAMAGES = [
    ("logits.npy", lambda content: content[:-4]), ("logits.npy", lambda content: b""), ("logits.npy", None),
    ("logits.npy", lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]),
    ("about.json", lambda content: content[:-4]), ("about.json", lambda content: b"[1, 2]"), ("about.json", None),
]  # fmt: skip


def test_damaged_files_are_computed_again(make, keep, tmp_path, capsys):
    first = [a.copy() for a in keep(make(features=(1,))).arrays]
    for name, damage in DAMAGES:
        (file,) = tmp_path.rglob(name)
        content = file.read_bytes()
        file.unlink()
        if damage is not None:
            file.write_bytes(damage(content))
        capsys.readouterr()
        assert same(first, keep(make(features=(1,))).arrays)
        assert "computed" in (said := capsys.readouterr().out)
        assert ("kept there were damaged" in said) == ((name, damage) != ("about.json", None))
        assert same(first, keep(make(features=(1,), deaf=True)).arrays)


def test_an_interruption_leaves_nothing_half_made(make, keep, tmp_path):
    stopped, calls = make(), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 2:
            assert list(tmp_path.rglob("*.partial"))  # it has begun to write
            raise KeyboardInterrupt

    stopped.module.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        keep(stopped)
    assert not [f for f in tmp_path.rglob("*") if f.is_file()] and stopped.module.training


def test_what_a_kill_leaves_is_not_taken(make, keep, tmp_path, monkeypatch):
    """Killed when only some files have their names: nothing tidies up, and nothing is believed without the last of them."""
    rename = os.replace

    def rename_then_die(source, target):
        rename(source, target)
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr("engine.run.answers.os.replace", rename_then_die)
        with pytest.raises(SystemExit):
            keep(make(features=(1,)))
    assert [f.suffix for f in tmp_path.rglob("*") if f.is_file()] == [".npy"]
    with pytest.raises(Refused):
        keep(make(features=(1,), deaf=True))
    keep(make(features=(1,)))


def test_a_full_disk_is_said_in_a_sentence(make, keep, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)  # not every system has it
    says = r"teacher bert cannot .* \(No space left on device\); give another --cache-dir"
    with pytest.raises(UserError, match=says):
        keep(make())
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


# Batches; whole runs with answers are in tests/run/test_answers_run.py


def test_a_batch_moves_and_is_pinned_with_its_answers(split, monkeypatch):
    """Of two teachers, the second one with features."""
    logits, features = np.zeros((ROWS, 2), np.float32), np.ones((ROWS, 3, 2), np.float32)
    batch, pinned = split.with_answers([[logits], [logits, features]]).batch([3, 1]), []
    moved = batch.to(torch.device("meta"))
    assert [[tuple(t.shape) for t in given] for given in moved.answers] == [[(2, 2)], [(2, 2), (2, 3, 2)]]
    tensors = [moved.labels, *(t for v in moved.inputs.values() for t in v.values()), *sum(moved.answers, [])]
    assert {t.device.type for t in tensors} == {"meta"}
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t + 1)
    copied = batch.pin()
    assert len(pinned) == len(tensors)
    assert all(torch.equal(t + 1, p) for t, p in zip(sum(batch.answers, []), sum(copied.answers, []), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_answers_on_a_gpu(split, make, tmp_path):
    teacher, cuda = make("bf16", (1,)), torch.device("cuda")
    teacher.module.to(cuda)
    kept = answers_of(teacher, split, "these examples", cuda, tmp_path, Console())
    pinned = split.with_answers([kept.arrays]).batch([3, 1]).pin()
    assert all(t.is_pinned() for t in pinned.answers[0])
    batch = pinned.to(cuda)
    for one, other in zip(live(teacher, batch), batch.answers[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE["bf16"])
    teacher.move("cpu")
    assert teacher.flat.weights.device == CPU


def test_a_moved_network_is_flattened_again(split, make):
    teacher = make("bf16")
    teacher.module.classifier.bias = torch.nn.Parameter(torch.zeros(2), requires_grad=False)  # never written to
    before = teacher.flatten()
    live(teacher, split.batch([0]))  # makes bf16 copies of what is trained and what is not
    teacher.move("meta")
    assert teacher.flat is not before
    teacher.flat.check()
    copies = {**teacher.leaves(), **teacher._frozen_copies()}
    assert "classifier.bias" in copies and len(copies) == len(list(teacher.module.parameters()))
    assert {t.device.type for t in copies.values()} == {"meta"}
