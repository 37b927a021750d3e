"""The benchmark of whole steps: what it runs and counts, that a wrong step is never timed, and the table of its results."""

import copy
from itertools import product

import pytest
import torch
from graph_simulator import SimulatedCapture
from torch.nn import functional as F

from bench import bench_steps, step_cases, step_truth, table
from bench.devices import Host
from bench.kernel_table import NOT_YET
from bench.measure import flops
from bench.records import merged
from bench.step_cases import SIZES, Case, Setting, engine_step, graph_step, masters, plain_step
from bench.step_truth import WrongError, distance, expected, validate, validate_graph
from engine import kernels
from engine.losses.objectives import Objective
from engine.meta.meta_step import MetaStep
from engine.models.network import Network

CPU = torch.device("cpu")
METHODS = [("finetune", 0), ("kd", 1), ("kd", 2), ("metadistil", 1), ("metadistil", 2)]
methods = pytest.mark.parametrize(("method", "teachers"), METHODS)


def setting(method, teachers=1, precision="fp32", size="miniature"):
    return Setting(Case(method, 4, 16, teachers, precision), SIZES[size], CPU)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(Host, "cache", lambda self: 1024)
    monkeypatch.setattr(Host, "dense_rate", lambda self, dtype: 1e12)
    return Host()


# What is run


def test_cases():
    found = bench_steps.cases(small=False)
    assert len({case.name for case in found}) == len(found)
    shapes = {(case.batch, case.length) for case in found}
    assert shapes == set(product((8, 32, 128), (32, 64, 128))) - {(128, 128)}  # what a CPU leaves out
    assert len(found) == len(shapes) * len(METHODS) * 2
    usual = [case for case in found if not case.full]
    assert usual == found[: len(usual)]
    assert {(case.method, case.teachers) for case in usual} == set(METHODS)
    assert {(case.method, case.precision) for case in usual} == set(
        product(("finetune", "kd", "metadistil"), ("fp32", "bf16"))
    )


def test_a_gpu_gets_every_shape_and_graphs(monkeypatch):
    monkeypatch.setattr(bench_steps, "CUDA", True)
    monkeypatch.setattr(bench_steps, "MOST_TOKENS", 2**30)
    found = bench_steps.cases(small=False)
    assert len(found) == 90
    assert sum(not case.full for case in found) == 22
    on_gpu = setting("kd")._replace(device=torch.device("cuda"))
    assert list(on_gpu.implementations()) == ["plain", "plain, fused", "engine", "graph"]


def test_models():
    student, teachers = setting("kd", 2, size="miniature distilbert").models(attention="eager", dropout=False)
    assert student.config.model_type == "distilbert" and {t.config.model_type for t in teachers} == {"bert"}
    assert not torch.equal(teachers[0].classifier.weight, teachers[1].classifier.weight)
    for module in (student, *teachers):
        assert module.config._attn_implementation == "eager"
        assert all(m.p == 0 for m in module.modules() if isinstance(m, torch.nn.Dropout))
    first, second = setting("kd", 1).models(), setting("kd", 1).models()
    assert first.student.config.hidden_dropout_prob == step_cases.DROPOUT > 0
    assert torch.equal(first.student.classifier.weight, second.student.classifier.weight)
    assert first.student.classifier.weight is not second.student.classifier.weight


@methods
def test_implementations_take_steps_and_leave_the_masters_alone(method, teachers):
    given = setting(method, teachers)
    master = masters(given.size, teachers, CPU)
    modules = [master.student, *master.teachers]
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


def test_plain_bf16_is_autocast():
    for method, teachers in METHODS:
        given = setting(method, teachers)
        fp32, bf16 = (
            plain_step(given._replace(case=given.case._replace(precision=p)), dropout=False)[1]()
            for p in ("fp32", "bf16")
        )
        assert 0 < abs(fp32["loss"] - bf16["loss"]) < 0.01 * fp32["loss"]


# What is counted


def test_flops():
    q, k, v = (torch.randn(2, 3, 80, 16, requires_grad=True) for _ in range(3))
    attention = 4 * 2 * 3 * 80 * 80 * 16  # two products
    assert flops(lambda: F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach())) == attention
    # backward: the scores again, then four products
    assert flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == attention + attention // 2 * 5
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert flops(lambda: a @ b) == 2 * 3 * 4 * 5


def test_rows(device):
    rows = {row["row"]: row for row in bench_steps.measured(setting("kd"), device, budget=0)}
    assert rows.keys() == {"plain", "plain, fused", "engine"}
    for row in rows.values():
        assert row["part"] == "cpu kd-4x16-K1-fp32" and row["rounds"] >= 3
        assert row["examples_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / 1e12)
        assert row["error"] < 1e-5
    student, (teacher,) = masters(SIZES["miniature"], 1, CPU)
    weights = sum(p.numel() for m in (student, teacher) for p in m.parameters())
    assert rows["plain"]["peak"] > 4 * weights
    assert set(rows["plain"]) == set(rows["engine"])
    forward = 2 * 64 * (4 * 16 * 16 + 2 * 16 * 64)  # tokens times the products of a layer, attention's own left out
    assert rows["plain"]["flops"] > (2 + 3) * forward  # two layers of the teacher; forward and backward of the student


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
    if what == "gradient":
        honest = Objective.slopes
        monkeypatch.setattr(Objective, "slopes", lambda *given: (
            (found := honest(*given))[0], [None if s is None else 1.01 * s for s in found[1]]))  # fmt: skip
    elif what == "loss":
        honest = Objective.slopes
        monkeypatch.setattr(Objective, "slopes", lambda *given: (1.01 * (found := honest(*given))[0], found[1]))
    else:
        honest = MetaStep.__init__
        monkeypatch.setattr(
            MetaStep, "__init__", lambda *given, pilot_lr, **more: honest(*given, pilot_lr=1.01 * pilot_lr, **more)
        )


@pytest.mark.parametrize(
    ("method", "what", "message"),
    [("kd", "gradient", "engine, kd-4x16-K1-fp32: the gradient of the student is 1.0e-02"),
     ("kd", "loss", "engine, kd-4x16-K1-fp32: loss is"),
     ("metadistil", "meta-gradient", "engine, metadistil-4x16-K1-fp32: the gradient of teacher 1 is 1.0e-02")],
)  # fmt: skip
def test_an_engine_that_is_a_hundredth_off_is_never_timed(monkeypatch, device, method, what, message):
    off(monkeypatch, what)
    monkeypatch.setattr(bench_steps, "interleaved", lambda *given: pytest.fail("it was timed"))
    with pytest.raises(WrongError, match=message):
        bench_steps.measured(setting(method), device, budget=0)


def test_distance():
    right = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert distance(right, right) == 0
    assert distance(right | {"b": torch.tensor([4.5])}, right) == pytest.approx(0.1)
    assert distance(right | {"b": torch.tensor([torch.nan])}, right) != distance(right, right)
    assert not distance(right | {"b": torch.tensor([torch.nan])}, right) <= 1e9
    with pytest.raises(WrongError, match="other weights: b"):
        distance({"a": right["a"]}, right)


# Graphs, simulated


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Plain operations, which the simulation sees, no rows of tables, whose number depends on the data, and learning rates
    that lie on the device."""
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    monkeypatch.setattr(Network, "table_rows", None)
    monkeypatch.setattr(kernels.ops.common.checks, "check_labels", lambda *_, **__: None)
    honest = step_cases.learner
    monkeypatch.setattr(
        step_cases, "learner", lambda module, name, lr, *more: honest(module, name, torch.tensor(lr), *more)
    )


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
@methods
def test_replays_are_eager_steps(method, teachers):
    capture = SimulatedCapture()
    validate_graph(setting(method, teachers), capture)
    assert (capture.captures, capture.replays) == (1, 1 + step_truth.REPLAYS)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("capture", [Idle, Late])
def test_a_graph_that_is_not_the_eager_step_is_refused(capture):
    with pytest.raises(WrongError, match="graph, metadistil-4x16-K1-fp32: replay [123] has"):
        validate_graph(setting("metadistil"), capture())


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


@pytest.fixture
def simulated(as_on_a_gpu, monkeypatch):
    """A graph among the implementations; returns what the captures are."""
    captures = []

    def capture():
        captures.append(SimulatedCapture())
        return captures[-1]

    honest = Setting.implementations
    monkeypatch.setattr(
        Setting, "implementations", lambda self: honest(self) | {"graph": lambda: graph_step(self, capture())[1]}
    )
    monkeypatch.setattr(bench_steps, "validate_graph", lambda given: validate_graph(given, capture()))
    return captures


def test_rows_of_a_graph(device, simulated):
    rows = {row["row"]: row for row in bench_steps.measured(setting("kd"), device, budget=0)}
    assert rows["graph"]["flops"] == rows["engine"]["flops"] > 0
    assert rows["graph"]["seconds"] > 0 and [c.captures for c in simulated] == [1, 1]
    assert simulated[1].replays > rows["graph"]["rounds"]


@pytest.mark.parametrize("how", ["broken", "idle"])
def test_a_graph_that_fails_is_left_out_and_the_others_stay(device, simulated, monkeypatch, how):
    def broken(self, call):
        raise RuntimeError("no room")

    if how == "broken":
        monkeypatch.setattr(SimulatedCapture, "capture", broken)
    else:
        monkeypatch.setattr(bench_steps, "validate_graph", lambda given: validate_graph(given, Idle()))
    rows = {row["row"]: row for row in bench_steps.measured(setting("kd"), device, budget=0)}
    assert rows["graph"]["failed"] and ("no room" if how == "broken" else "replay 1") in rows["graph"]["left_out"]
    assert rows["engine"]["seconds"] > 0


# The table


def machine(device, name="a processor"):
    versions = {"torch": "2", "python": "3", "cuda": "13.0", "driver": "580"}
    return {"hardware": {"device": device, "name": name, "threads": 2}, "versions": versions}


def row(device, implementation, milliseconds, method="kd", batch=32, precision="fp32", full=False, **settings):
    seconds = milliseconds / 1e3
    return {
        "part": f"{device} {method} {batch} {precision}", "device": device, "models": "models", "method": method, "batch": batch,
        "length": 64, "teachers": 1, "precision": precision, "full": full, "dense_rate": 1e12, "row": implementation,
        "seconds": seconds, "lower": 0.9 * seconds, "upper": 1.1 * seconds, "examples_per_second": batch / seconds,
        "tokens_per_second": 64 * batch / seconds, "flops": 1e9, "mfu": 1e9 / seconds / 1e12, "peak": 2**30, "reserved": 0,
        "error": 1e-6,
    } | settings  # fmt: skip


def test_the_table_holds_the_engine_against_the_faster_plain_one():
    rows = [row("cpu", "plain", 40), row("cpu", "plain, fused", 30, peak=2**31), row("cpu", "engine", 20),
            row("cpu", "plain", 10, precision="bf16"), row("cpu", "engine", 20, precision="bf16", error=2e-2)]  # fmt: skip
    rendered = table.render({"kind": "steps", **merged({"rows": []}, rows, {"cpu": machine("cpu")})})
    lines = rendered.splitlines()
    assert lines[0] == NOT_YET
    assert lines[2] == "On a CPU, models:"
    assert lines[6] == "| kd | 1 | 32 x 64 | fp32 | 30 ms | 20 ms | 1.50 x | 1,600 | 5 % | 1.00 GiB | 0.50 |"
    assert lines[7] == "| kd | 1 | 32 x 64 | bf16 | 10 ms | 20 ms | 0.50 x | 1,600 | 5 % | 1.00 GiB | 1.00 |"
    assert "The engine is the slower one in 1 of 2 cases." in rendered
    assert "within 1e-06 (fp32) and 2e-02 (bf16) of plain PyTorch in float32." in rendered
    assert rendered.endswith("a processor, 2 threads, torch 2, Python 3.")


def test_graphs_and_what_is_left_out_on_a_gpu():
    rows = [row("cuda", "plain", 40), row("cuda", "engine", 20), row("cuda", "graph", 5),
            row("cuda", "plain", 40, batch=8), row("cuda", "engine", 20, batch=8)]  # fmt: skip
    left = {
        k: v
        for k, v in row("cuda", "graph", 1, batch=8, left_out="the step waits.", failed=True).items()
        if k != "seconds"
    }
    rendered = table.render(
        {"kind": "steps", **merged({"rows": []}, [*rows, left], {"cuda": machine("cuda", "a GPU")})}
    )
    assert NOT_YET not in rendered
    assert "| kd | 1 | 8 x 64 | fp32 | 40 ms | 20 ms | 2.00 x |  |  | 400 | 5 % | 1.00 GiB | 1.00 |" in rendered
    assert (
        "| kd | 1 | 32 x 64 | fp32 | 40 ms | 20 ms | 2.00 x | 5 ms | 8.00 x | 6,400 | 20 % | 1.00 GiB | 1.00 |"
        in rendered
    )
    assert "graph is left out: the step waits." in rendered
    assert rendered.index("8 x 64") < rendered.index("32 x 64")
    assert rendered.endswith("a GPU, torch 2, CUDA 13.0, driver 580, Python 3.")


def test_a_long_table_shows_the_usual_rows():
    rows = [row("cpu", name, 40, batch=8 + n, full=n > 3) for n in range(40) for name in ("plain", "engine")]
    rendered = table.render({"kind": "steps", **merged({"rows": []}, rows, {"cpu": machine("cpu")})})
    assert rendered.count("| kd |") == 4
    assert "36 more cases stand in `bench/results/steps.json`." in rendered
