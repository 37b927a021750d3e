"""What is restored goes on bit for bit; what cannot be read is said; a plan counts as the loop does."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from engine.errors import UserError
from engine.models.learner import Learner
from engine.models.network import Encoder
from engine.run import checkpoint
from engine.run.phase import Plan, Progress
from engine.run.resume import Resume, Standing
from engine.run.trainer import _rounds


class Tied(nn.Module):
    """A tied weight, buffers (one of them expanded, as transformers' position ids are), and a layer without gradients."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(9, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(6, 9)
        self.out.weight = self.words.weight
        self.unused = nn.Linear(6, 6)
        self.register_buffer("positions", torch.arange(4).expand(1, -1), persistent=False)

    def forward(self, ids):
        return self.out(self.dropout(self.norm(self.words(ids))))


def learner(seed):
    network = Encoder("tied", Tied(seed).train(), "words")
    return Learner.adamw(network, lr=0.05, steps=10, warmup_ratio=0.3, weight_decay=0.1, max_grad_norm=1.0)


def train(learner, steps):
    for step in steps:
        ids = torch.randint(9, (8,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(learner.network.module(ids), (ids + 1) % 9).backward()
        learner.update()


def standing(learner):
    state = SimpleNamespace(learners=lambda: [learner], round=learner.schedule.last_epoch)
    return Standing(SimpleNamespace(name="phase", state=state))


@pytest.mark.parametrize("at", [0, 2, 5])  # before any step, in the warm-up, in the decay
def test_going_on_from_a_checkpoint_is_going_on(tmp_path, at):
    whole, again, file, cpu = learner(seed=0), learner(seed=1), tmp_path / "c.safetensors", torch.device("cpu")
    torch.manual_seed(5)
    train(whole, range(at))
    whole.below_eps, unread = torch.tensor([5, 3]), standing(whole)
    unread.tally.add({"loss": torch.tensor(0.1), "other": torch.tensor(float("nan"))})
    Resume.of(file, "this run").save(unread, cpu)
    expected = unread.tally.read([whole])
    train(whole, range(at, 8))
    after = torch.get_rng_state()

    torch.manual_seed(99)
    resume = Resume.of(file, "this run")
    assert resume.stands_in("phase") and not resume.stands_in("another")
    resume.restore(restored := standing(again), cpu)
    assert restored.tally.read([again]) == expected and expected[0]["below_eps/tied"] == 0.6 and expected[1] == 1
    assert not resume.stands_in("phase") and again.network.module.out.weight is again.network.module.words.weight
    train(again, range(at, 8))
    assert torch.equal(torch.get_rng_state(), after)
    found, expected = ({**checkpoint.module_tensors(one.network.module), **checkpoint.optimizer_tensors(one.optimizer)}
                       for one in (again, whole))  # fmt: skip
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())
    # moments, also of the layer without gradients
    assert len(checkpoint.optimizer_tensors(again.optimizer)) == 3 * len(list(whole.network.module.parameters()))
    assert [g["lr"] for g in again.optimizer.param_groups] == [g["lr"] for g in whole.optimizer.param_groups]


def test_tensors_and_state_come_back_as_they_were(tmp_path):
    tensors = {
        "a/bf16": torch.randn(3, 2).bfloat16(),
        "a/transposed": torch.randn(3, 2).T,
        "a/scalar": torch.tensor(3.5, dtype=torch.float64),
        "b/bytes": torch.arange(5, dtype=torch.uint8),
        "b/nan": torch.tensor([float("nan"), float("-inf")]),
    }
    state = {"phase": "kd", "nested": {"list": [1, 2.5, None, True, "ü"]}}
    checkpoint.save(tmp_path / "new" / "folder" / "c.safetensors", tensors, state)
    got, got_state = checkpoint.load(tmp_path / "new" / "folder" / "c.safetensors")
    assert got_state == state and got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name].nan_to_num(7), tensor.nan_to_num(7)), name
    assert not list((tmp_path / "new" / "folder").glob("*.partial"))
    assert checkpoint.under("a", got).keys() == {"bf16", "transposed", "scalar"}
    assert checkpoint.prefixed("a", checkpoint.under("a", got)).keys() == {n for n in tensors if n[0] == "a"}
    assert checkpoint.under("a/b", {"a/bc": torch.zeros(1)}) == {}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"a": torch.arange(100.0)}, {"step": 1})
    return path


def foreign(**metadata):
    return save({"a": torch.zeros(2)}, metadata=metadata or None)


REFUSED = {
    **{f"{n} bytes of it": (lambda whole, n=n: whole[:n], "cannot be read") for n in (0, 4, 30, 200, -1)},
    "text": (lambda whole: b"step: 3\n" * 50, "cannot be read"),
    "no format": (lambda whole: foreign(), "has format None"),
    "no JSON": (lambda whole: foreign(format=str(checkpoint.FORMAT), state="{"), "cannot be read"),
    "no state": (lambda whole: foreign(format=str(checkpoint.FORMAT)), "cannot be read"),
    "a later format": (
        lambda whole: whole.replace(b'"format":"%d"' % checkpoint.FORMAT, b'"format":"9"'),
        f"has format 9, and this version reads only format {checkpoint.FORMAT}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read(good, name):
    spoil, said = REFUSED[name]
    good.write_bytes(spoil(good.read_bytes()))
    with pytest.raises(UserError) as caught:
        checkpoint.load(good)
    message = str(caught.value)
    assert str(good) in message and said in message and "--output" in message and "\n" not in message


@pytest.mark.parametrize("where", ["save_file", "os.fsync", "os.replace"])
def test_a_crash_while_writing_leaves_the_old_one(good, monkeypatch, where):
    def crash(*args, **kwargs):
        if where == "save_file":
            args[1].write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(f"engine.run.checkpoint.{where}", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(good, {"a": torch.zeros(100)}, {"step": 2})
    monkeypatch.undo()
    tensors, state = checkpoint.load(good)
    assert torch.equal(tensors["a"], torch.arange(100.0)) and state == {"step": 1}
    checkpoint.save(good, {"a": torch.zeros(100)}, {"step": 2})  # what was left behind is in nobody's way
    assert checkpoint.load(good)[1] == {"step": 2}


def test_only_json_is_written(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "c", {}, {"step": torch.tensor(1)})
    assert not (tmp_path / "c").exists()


# The plan, against the trainer's own walk over the batches


class Numbered:
    """An epoch is `batches` numbered by epoch and place."""

    def __init__(self, batches):
        self.batches = batches

    def epoch(self, number, start=0):
        return ((number, i) for i in range(start, self.batches))


def walk(plan, step=0):
    progress = Progress(step)
    for taken in _rounds(Numbered(plan.batches), plan, progress):
        progress.step += len(taken)
        yield taken


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    batches=st.integers(1, 12),
    epochs=st.integers(1, 4),
    max_steps=st.none() | st.integers(1, 50),
    round_size=st.integers(1, 15),
)
def test_plan_counts_what_the_loop_does(batches, epochs, max_steps, round_size):
    plan = Plan(batches, epochs, max_steps, round_size)
    rounds = list(walk(plan))
    taken = [b for r in rounds for b in r]
    steps = batches * epochs if max_steps is None else max_steps
    assert plan.steps == len(taken) == steps
    assert plan.rounds == len(rounds)
    assert taken == [divmod(i, batches) for i in range(steps)]  # every batch in its turn
    for r in rounds:
        assert len({epoch for epoch, _ in r}) == 1 and len(r) <= round_size  # a round ends with its epoch
        ends = r[-1][1] == batches - 1 or r[-1] == taken[-1]
        assert len(r) == round_size or ends
    for i in {len(rounds) // 3, len(rounds) // 2}:  # a resumed run goes on where it stood
        assert list(walk(plan, sum(map(len, rounds[:i])))) == rounds[i:]
