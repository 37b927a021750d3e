"""The benchmark of whole steps: what it runs and counts, and that a wrong step is never timed."""

import copy
from itertools import product

import pytest
import torch
from graph_simulator import SimulatedCapture

from bench import bench_steps, step_truth
from bench.step_cases import SIZES, Case, Setting, engine_step, graph_step, masters
from bench.step_truth import WrongError, distance, expected, validate, validate_graph
from engine.losses.objectives import Objective
from engine.meta.meta_step import MetaStep

CPU = torch.device("cpu")
METHODS = [("finetune", 0), ("kd", 1), ("kd", 2), ("metadistil", 1), ("metadistil", 2)]
methods = pytest.mark.parametrize(("method", "teachers"), METHODS)


def setting(method, teachers=1, precision="fp32", size="miniature"):
    return Setting(Case(method, 4, 16, teachers, precision), SIZES[size], CPU)


# What is run


def test_cases(monkeypatch):
    usual, found = (bench_steps.cases(small=False, full=full) for full in (False, True))
    assert len({case.name for case in found}) == len(found)
    shapes = {(case.batch, case.length) for case in found}
    assert shapes == set(product((8, 32, 128), (32, 64, 128))) - {(128, 128)}  # what a CPU leaves out
    assert len(found) == len(shapes) * len(METHODS) * 2
    assert usual == found[: len(usual)] and not any(case.full for case in usual)
    assert {(case.method, case.teachers) for case in usual} == set(METHODS)
    assert {(c.method, c.precision) for c in usual} == set(product(("finetune", "kd", "metadistil"), ("fp32", "bf16")))
    monkeypatch.setattr(bench_steps, "CUDA", True)
    monkeypatch.setattr(bench_steps, "MOST_TOKENS", 2**30)
    assert [len(bench_steps.cases(small=False, full=full)) for full in (False, True)] == [22, 90]
    (_, rows), *_ = bench_steps.groups(small=False, full=False).values()
    assert rows == ["plain", "plain, fused", "engine", "graph"]


@pytest.mark.parametrize(("method", "teachers"), [("finetune", 0), ("metadistil", 2)])
def test_implementations_take_steps_and_leave_the_masters_alone(method, teachers):
    given = setting(method, teachers)
    master = masters(given.size, teachers, CPU)
    modules = [master.student, *master.teachers]
    assert len({m.classifier.weight.sum().item() for m in modules}) == 1 + teachers
    before = copy.deepcopy([m.state_dict() for m in modules])
    for build in given.implementations().values():
        call = build()
        first = float(call()["loss"])
        assert float(call()["loss"]) != first
    assert all(torch.equal(m.state_dict()[n], b[n]) for m, b in zip(modules, before, strict=True) for n in b)


def test_the_engines_round_may_have_several_pilots():
    given = setting("metadistil")._replace(pilots=3)
    batches, quizzes = given.batches()
    assert (len(batches), len(quizzes)) == (3, 1)
    state, call = engine_step(given)
    call()
    assert state.round == 1 and state.student.schedule.last_epoch == 3


# A wrong step is not timed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", ["miniature", "miniature distilbert"])
@methods
def test_every_implementation_computes_the_step(method, teachers, size, precision):
    given = setting(method, teachers, precision, size)
    errors = {name: validate(given, name) for name in given.implementations()}
    assert all(error < (1e-5 if precision == "fp32" else 0.1) for error in errors.values())
    assert len(expected(given).gradients) == 1 + (teachers if method == "metadistil" else 0)
    assert all(g["classifier.weight"].norm() > 0 for g in expected(given).gradients)
    if precision == "bf16":
        assert min(errors.values()) > 1e-4


def off(monkeypatch, what):
    """The engine a hundredth off."""
    slopes, init = Objective.slopes, MetaStep.__init__
    if what == "gradient":
        monkeypatch.setattr(Objective, "slopes", lambda *given: (
            (found := slopes(*given))[0], [None if s is None else 1.01 * s for s in found[1]]))  # fmt: skip
    elif what == "loss":
        monkeypatch.setattr(Objective, "slopes", lambda *given: (1.01 * (found := slopes(*given))[0], found[1]))
    else:
        monkeypatch.setattr(
            MetaStep, "__init__", lambda *given, pilot_lr, **more: init(*given, pilot_lr=1.01 * pilot_lr, **more)
        )


@pytest.mark.parametrize(
    ("method", "what", "message"),
    [("kd", "gradient", "engine, kd-4x16-K1-fp32: the gradient of the student is 1.0e-02"),
     ("kd", "loss", "engine, kd-4x16-K1-fp32: loss is"),
     ("metadistil", "meta-gradient", "engine, metadistil-4x16-K1-fp32: the gradient of teacher 1 is 1.0e-02")],
)  # fmt: skip
def test_an_engine_that_is_a_hundredth_off_is_never_timed(monkeypatch, device, method, what, message):
    off(monkeypatch, what)
    monkeypatch.setattr(Setting, "implementations", lambda self: {"engine": None})
    monkeypatch.setattr(bench_steps, "interleaved", lambda *given: pytest.fail("it was timed"))
    with pytest.raises(WrongError, match=message):
        bench_steps.measured(setting(method), device, budget=0)


def test_distance():
    right = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert distance(right, right) == 0
    assert distance(right | {"b": torch.tensor([4.5])}, right) == pytest.approx(0.1)
    assert not distance(right | {"b": torch.tensor([torch.nan])}, right) <= 1e9
    with pytest.raises(WrongError, match="other weights: b"):
        distance({"a": right["a"]}, right)


# Graphs, simulated


class Idle(SimulatedCapture):
    """Replays do nothing."""

    def capture(self, call):
        return (lambda: None), SimulatedCapture.capture(self, call)[1]


class Late(SimulatedCapture):
    """The third replay is left out."""

    def capture(self, call):
        replay, kept = super().capture(call)
        return (lambda: None if self.replays == 2 and not setattr(self, "replays", 3) else replay()), kept


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("method", "teachers"), [("finetune", 0), ("metadistil", 2)])
def test_replays_are_eager_steps(method, teachers):
    capture = SimulatedCapture()
    validate_graph(setting(method, teachers), capture)
    assert (capture.captures, capture.replays) == (1, 1 + step_truth.REPLAYS)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("capture", [Idle, Late])
def test_a_graph_that_is_not_the_eager_step_is_refused(capture):
    with pytest.raises(WrongError, match="graph, kd-4x16-K1-fp32: replay [123] has"):
        validate_graph(setting("kd"), capture())


def test_a_graph_whose_weights_are_off_is_refused(as_on_a_gpu, monkeypatch):
    honest = step_truth.graph_step

    def meddling(*given, **settings):
        state, call = honest(*given, **settings)

        def meddle():
            found = call()
            if state.round == 7:
                state.student.network.flat.weights[0] += 1e-5
            return found

        return state, meddle

    monkeypatch.setattr(step_truth, "graph_step", meddling)
    with pytest.raises(WrongError, match="weights of the student are 1.0e-05 from those of eager steps"):
        validate_graph(setting("kd"), SimulatedCapture())


# What is kept of them


def measured(monkeypatch, device, names, budget=0, check=SimulatedCapture):
    """These rows of KD, and a simulated graph that `check` validates."""
    honest = Setting.implementations
    monkeypatch.setattr(Setting, "implementations", lambda self: {name: honest(self)[name] for name in names} | {
        "graph": lambda: graph_step(self, SimulatedCapture())[1]})  # fmt: skip
    monkeypatch.setattr(bench_steps, "validate_graph", lambda given: validate_graph(given, check()))
    return bench_steps.measured(setting("kd"), device, budget)


def test_what_is_kept_of_a_step(device, as_on_a_gpu, monkeypatch):
    group = measured(monkeypatch, device, ["plain", "engine"])
    assert group.info.keys() == group.rounds.keys() == {"plain", "engine", "graph"}
    assert not group.left_out and not group.failed
    for name, info in group.info.items():
        seconds = torch.tensor(group.rounds[name]).median().item()
        assert len(group.rounds[name]) == 5 and info["device"] == "cpu" and info["error"] < 1e-5
        assert info["examples_per_second"] == pytest.approx(4 / seconds)
        assert info["tokens_per_second"] == pytest.approx(64 / seconds)
        assert info["mfu"] == pytest.approx(info["flops"] / seconds / 1e12)
        assert info.keys() == group.info["plain"].keys()
    student, (teacher,) = masters(SIZES["miniature"], 1, CPU)
    assert group.info["plain"]["peak"] > 4 * sum(p.numel() for m in (student, teacher) for p in m.parameters())
    forward = 2 * 64 * (4 * 16 * 16 + 2 * 16 * 64)  # tokens times the products of a layer, attention's own left out
    flops = {name: info["flops"] for name, info in group.info.items()}
    assert flops["plain"] > (2 + 3) * forward  # two layers of the teacher; forward and backward of the student
    assert flops["graph"] == flops["engine"] > 0


@pytest.mark.parametrize(("capture", "why"), [(Idle, "replay 1"), (None, "no room")])
def test_a_graph_that_fails_is_named_and_the_others_stay(device, as_on_a_gpu, monkeypatch, capture, why):
    if capture is None:
        monkeypatch.setattr(SimulatedCapture, "capture", lambda self, call: (_ for _ in ()).throw(RuntimeError(why)))
    group = measured(monkeypatch, device, ["engine"], budget=None, check=capture or SimulatedCapture)
    assert why in group.failed["graph"] and "graph" not in group.info
    assert group.info.keys() == {"engine"} and not group.rounds
