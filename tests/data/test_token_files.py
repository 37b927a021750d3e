"""Token ids on disk: the same ones come back, mapped, and nothing that is half-made, damaged or another's is read."""

import os
import shutil
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.token_files import STALE, load, save
from engine.errors import UserError

EXAMPLES = [[101, 7, 102], [101, 102], [101, 2_000_000_000, 8, 9, 102]]
TYPES = [[0, 0, 0], [0, 1], [0, 0, 1, 1, 127]]


def chunks(examples=EXAMPLES, types=None, size=2):
    for i in range(0, len(examples), size):
        yield examples[i : i + size], None if types is None else types[i : i + size]


def read(values, offsets):
    return [values[a:b].tolist() for a, b in pairwise(offsets)]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    examples=st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 127)), max_size=6), min_size=1)
    .filter(any),
    size=st.integers(1, 5),
    typed=st.booleans(),
)  # fmt: skip
def test_what_is_written_comes_back(examples, size, typed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "a"
    ids, types = ([[token[i] for token in example] for example in examples] for i in (0, 1))
    for tokens in (save(folder, chunks(ids, types if typed else None, size)), load(folder, len(examples))):
        assert read(tokens.ids, tokens.offsets) == ids
        assert (read(tokens.types, tokens.offsets) == types) if typed else tokens.types is None
        arrays = {"int32": tokens.ids, "int64": tokens.offsets} | ({"int8": tokens.types} if typed else {})
        assert all(isinstance(array, np.memmap) and array.dtype == name for name, array in arrays.items())
        assert not tokens.ids.flags.writeable
    assert load(folder, len(examples) + 1) is None and load(folder.parent / "b", len(examples)) is None
    assert {path.name for path in folder.parent.iterdir()} == {"a"}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of an id": lambda folder: flip(folder / "ids.npy"),
    "ids cut off": lambda folder: os.truncate(folder / "ids.npy", 130),
    "types gone": lambda folder: (folder / "types.npy").unlink(),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "checksums cut off": lambda folder: os.truncate(folder / "checksums.json", 9),
    "a list for checksums": lambda folder: (folder / "checksums.json").write_text("[]"),
    "checksums that are no text": lambda folder: (folder / "checksums.json").write_bytes(b"\xff\xfe\xff"),
    "a folder of another": lambda folder: (
        [file.unlink() for file in folder.iterdir()] + [(folder / "x").write_text("")]
    ),
    "a file of that name": lambda folder: [shutil.rmtree(folder), folder.write_text("tokens")],
    "a folder for a file": lambda folder: [(folder / "ids.npy").unlink(), (folder / "ids.npy").mkdir()],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_not_read_and_is_replaced(name, tmp_path):
    folder = tmp_path / "a"
    save(folder, chunks(types=TYPES))
    DAMAGE[name](folder)
    assert load(folder, len(EXAMPLES)) is None
    save(folder, chunks(types=TYPES))
    tokens = load(folder, len(EXAMPLES))
    assert read(tokens.ids, tokens.offsets) == EXAMPLES and read(tokens.types, tokens.offsets) == TYPES
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_or_a_kill_on_the_way_leaves_nothing_that_is_read(tmp_path):
    def broken():
        yield next(chunks())
        (temporary,) = tmp_path.iterdir()  # what a kill at this moment leaves behind
        shutil.copytree(temporary, tmp_path / f"{temporary.name}-killed")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        save(tmp_path / "a", broken())
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a-") and list(left.rglob("ids.npy"))
    assert load(tmp_path / "a", 2) is None
    save(tmp_path / "a", chunks())
    assert {path.name for path in tmp_path.iterdir()} == {"a", left.name}  # it could be another process at work
    assert load(tmp_path / "a", len(EXAMPLES)) is not None
    then = time.time() - STALE - 60
    os.utime(left, (then, then))
    save(tmp_path / "a", chunks())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("existing", ["nothing", "a damaged folder"])
def test_several_that_write_at_once_all_get_theirs(existing, tmp_path):
    folder, barrier, found = tmp_path / "a", threading.Barrier(4), []
    if existing == "a damaged folder":
        save(folder, chunks())
        flip(folder / "ids.npy")

    def together():
        yield from chunks()
        barrier.wait(timeout=60)  # all of them have written, none has moved its folder

    def write():
        found.append(save(folder, together()))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 4
    assert all(read(tokens.ids, tokens.offsets) == EXAMPLES for tokens in [*found, load(folder, len(EXAMPLES))])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_one_that_is_a_moment_too_late_leaves_the_others_in_place(tmp_path, monkeypatch):
    """Another process moves its folder there between the two moves of this one."""
    rename, moves = os.rename, []

    def late(source, target):
        moves.append(target)
        if len(moves) == 2:
            shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    tokens = save(tmp_path / "a", chunks())
    assert len(moves) == 2
    assert all(read(t.ids, t.offsets) == EXAMPLES for t in (tokens, load(tmp_path / "a", len(EXAMPLES))))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_written_is_an_error_of_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^Token ids cannot be written to .*file \(.+\); .* another --cache-dir\.$"):
        save(tmp_path / "file" / "a", chunks())
