"""fused_linear_kd of every backend against last layers, whole logits and the formula in float64."""

import weakref

import pytest
import torch
from kernel_helpers import BF16, F16, F32, F64, logits, near, one_backend, plain, triton_is_slow
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.kernels import fused_linear_kd
from engine.kernels.ops.fused_linear_kd import op as module

# Relative to the largest expected number. The logits here are exact in every dtype. float32 and float64: as for kd_loss,
# with a product behind it. 16 bits: the gradient at the logits is rounded, and what its product gives, and, times the
# upstream, again: three times 2^-8 or 2^-11; interpreted Triton cuts bfloat16 off, which is twice as much.
TOLERANCE = {F64: 1e-12, F32: 1e-4, BF16: 1.6e-2, F16: 1.5e-3}
SETTINGS = {"temperature": 2.0, "alpha": 0.3}


WHOLE, ROWS, ROW = 10**6, 3 * 7, 1  # one chunk, three rows a chunk, a row a chunk


@pytest.fixture(params=[ROWS], autouse=True)
def chunk(request, monkeypatch):
    """Logits of a model at a time, here of 7 classes."""
    monkeypatch.setitem(module.CHUNK, "cpu", request.param)


def whole(*shape, seed, most=2):
    """Small whole numbers: products of such have no rounding in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).double()


class Layers:
    """Last layers and what they read."""

    def __init__(self, leading=(5,), C=7, student=4, teachers=(3, 6), dtype=F32, labels=True, ignore=-100):
        rows = torch.Size(leading).numel()
        self.dtypes = list(dtype) if isinstance(dtype, tuple) else [dtype] * (1 + len(teachers))
        made = list(enumerate([student, *teachers]))
        self.hidden = [whole(*leading, H, seed=k).to(self.dtypes[k]) for k, H in made]
        self.weight = [(whole(C, H, seed=9 + k, most=1) / 2).to(self.dtypes[k]) for k, H in made]
        self.labels = None
        if labels:
            row = torch.arange(rows)
            self.labels = torch.where(row % 3 == 1, ignore, 5 * row % C).reshape(leading)
        self.leaves = [self.hidden[0].requires_grad_(), self.weight[0].requires_grad_()]

    def loss(self, **changes):
        return fused_linear_kd(
            self.hidden[0], self.weight[0], self.hidden[1:], self.weight[1:], self.labels, **SETTINGS | changes
        )

    def found(self, upstream=0.75, **changes):
        loss = self.loss(**changes)
        return [loss.detach(), *torch.autograd.grad(loss, self.leaves, torch.tensor(upstream, dtype=loss.dtype))]

    def expected(self, upstream=0.75, **changes):
        hidden, weight = ([x.detach().double() for x in group] for group in (self.hidden, self.weight))
        leaves = [hidden[0].requires_grad_(), weight[0].requires_grad_()]
        student, *teachers = (h @ w.T for h, w in zip(hidden, weight, strict=True))
        loss = plain(student, teachers, self.labels, **SETTINGS | changes)
        return [loss.detach(), *torch.autograd.grad(upstream * loss, leaves)]

    def agree(self, **changes):
        wide = F64 if F64 in self.dtypes else F32
        found, expected = self.found(**changes), self.expected(**changes)
        for got, wanted, dtype in zip(found, expected, [wide, self.dtypes[0], self.dtypes[0]], strict=True):
            near(got, wanted, dtype, max(TOLERANCE[wide], TOLERANCE[dtype]))
        return found


@pytest.mark.parametrize(
    ("dtype", "chunk"),
    [
        (F32, WHOLE), (F32, ROW), (F64, ROWS), (BF16, WHOLE), (BF16, ROW), (F16, ROWS), ((BF16, F32, BF16), ROWS),
        ((F32, F64, F16), ROW),
    ],
    indirect=["chunk"], ids=str,
)  # fmt: skip
def test_chunks_and_dtypes(dtype, backend):
    Layers(dtype=dtype).agree()
    Layers(dtype=dtype).agree(reduction="sum")


CASES = {
    "one teacher": ({"teachers": (5,)}, {}),
    "four teachers of given weights": ({"teachers": (1, 2, 3, 4)}, {"weights": [0.1, 0.2, 0.3, 0.5]}),
    "a tensor of weights": ({}, {"weights": torch.tensor([0.25, 0.6])}),
    "no labels": ({"labels": None}, {}),
    "an ignored label behind the classes": ({"ignore": 255}, {"ignore_index": 255}),
    "cross-entropy alone": ({}, {"alpha": 0}),
    "KL alone": ({}, {"alpha": 1}),
    "another temperature": ({}, {"temperature": 20.0}),
    "no leading dimension": ({"leading": ()}, {}),
    "no row": ({"leading": (0,)}, {}),
    "no row, a sum": ({"leading": (2, 0)}, {"reduction": "sum"}),
    "one class": ({"C": 1}, {}),
    "many classes": ({"C": 2000, "leading": (2,), "teachers": (3,)}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_case(case, backend):
    layers, changes = CASES[case]
    Layers(**layers).agree(**changes)


@triton_is_slow
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_error_does_not_grow_with_the_chunks(dtype, backend, monkeypatch):
    """The weights' gradient is added up in float32."""
    layers, errors = Layers((48,), dtype=dtype, teachers=(3,)), []
    expected = layers.expected()[2]
    for rows in (48, 2):
        monkeypatch.setitem(module.CHUNK, "cpu", rows * 7)
        errors.append(((layers.found()[2] - expected).abs().max() / expected.abs().max()).item())
    assert errors[1] < 1.5 * errors[0] + TOLERANCE[dtype] / 8, errors


def test_strided_and_expanded(backend):
    layers = Layers((2, 3))
    student, *teachers = layers.hidden
    layers.hidden = [student.detach().transpose(0, 1).contiguous().transpose(0, 1), teachers[0][:, :1].expand(2, 3, 3)]
    layers.hidden += [teachers[1].mT.contiguous().mT]
    layers.weight = [w.detach().T.contiguous().T for w in layers.weight]
    layers.labels = layers.labels.T.contiguous().T
    layers.leaves = [layers.hidden[0].requires_grad_(), layers.weight[0].requires_grad_()]
    before = [x.detach().clone() for x in (*layers.hidden, *layers.weight, layers.labels)]
    layers.agree()
    after = [*layers.hidden, *layers.weight, layers.labels]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "inputs stay as they are"


# Autograd


@pytest.mark.parametrize("who", [0, 1, None])
def test_one_gradient_alone(who, backend):
    """Or none, with a loss that is the same."""
    layers = Layers()
    wanted = layers.found()
    for i, leaf in enumerate(layers.leaves):
        leaf.requires_grad_(i == who)
    loss = layers.loss()
    near(loss.detach(), wanted[0].double(), F32, 1e-6)
    assert loss.requires_grad == (who is not None)
    if who is not None:
        layers.hidden[1].requires_grad_()  # of a teacher, no matter without grad mode
        with torch.no_grad():
            assert not layers.loss().requires_grad
        near(torch.autograd.grad(loss, layers.leaves[who], torch.tensor(0.75))[0], wanted[1 + who].double(), F32, 1e-6)


@pytest.mark.parametrize(("dtype", "chunk"), [(F32, WHOLE), (BF16, ROWS), (F16, ROW)], indirect=["chunk"], ids=str)
def test_backward_again_and_scaled(dtype, backend):
    layers = Layers(dtype=dtype)
    loss = layers.loss()
    first, second = (torch.autograd.grad(loss, layers.leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    scaled = torch.autograd.grad(4 * loss, layers.leaves)
    assert all(torch.equal(a, 4 * b) for a, b in zip(scaled, first, strict=True))
    for _ in range(2):
        (3 * layers.loss() + layers.leaves[0].float().square().sum()).backward()
    for leaf, gradient in zip(layers.leaves, first, strict=True):
        more = 2 * leaf.detach().double() if leaf is layers.leaves[0] else 0
        near(leaf.grad, 2 * (3 * gradient.double() + more), dtype, TOLERANCE[dtype])


def test_first_order_only(backend):
    layers, factor = Layers(), torch.ones((), requires_grad=True)
    plain_gradients = layers.found(upstream=1.0)[1:]
    gradients = torch.autograd.grad(factor * layers.loss(), layers.leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True)), "a graph alone is no error"
    for gradient in gradients:
        for source in (*layers.leaves, factor):
            with pytest.raises(RuntimeError, match="no second derivative; use kd_loss"):
                torch.autograd.grad(gradient.sum(), source, retain_graph=True)


def test_nothing_holds_on_to_the_inputs(backend):
    layers = Layers()
    alive = [weakref.ref(x) for x in (*layers.hidden, *layers.weight)]
    loss = layers.loss()
    loss.backward(retain_graph=True)
    loss.backward()
    del layers, loss
    assert not any(x() is not None for x in alive)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


@triton_is_slow
@pytest.mark.parametrize("gradients", [True, False])
def test_logits_are_never_whole(gradients, backend, monkeypatch):
    """Each of 16 rows of 500 classes, three rows at a time."""
    monkeypatch.setitem(module.CHUNK, "cpu", 3 * 500)
    layers = Layers((16,), C=500, student=2, teachers=(2,), dtype=BF16)
    with torch.no_grad(), Largest() as seen:
        module._fused(
            layers.hidden[0], layers.weight[0], layers.hidden[1:], layers.weight[1:], layers.labels, None, [1.0],
            2.0, 0.3, -100, "mean", gradients, gradients,
        )  # fmt: skip
    assert 3 * 500 <= seen.numbers < 4 * 500


# torch.compile and the dispatcher


@one_backend
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(compiler, backend):
    torch._dynamo.reset()
    compiled = torch.compile(fused_linear_kd, fullgraph=True, backend=compiler)
    for rows in (5, 6, 9):
        layers = Layers((rows,))
        arguments = (layers.hidden[0], layers.weight[0], layers.hidden[1:], layers.weight[1:], layers.labels)
        loss = compiled(*arguments, **SETTINGS)
        found = [loss.detach(), *torch.autograd.grad(0.75 * loss, layers.leaves)]
        for a, b in zip(found, layers.found(), strict=True):
            near(a, b.double(), F32, 1e-5)


@one_backend
def test_opcheck(backend):
    """The last one with a hidden tensor whose layout is not that of its gradient."""
    turned = Layers()
    turned.hidden[0] = turned.leaves[0] = logits(4, 5).T.requires_grad_()
    for layers, weights, reduction, wanted in (
        (Layers(), None, "mean", (True, True)), (Layers((2, 3), labels=None), torch.ones(2), "sum", (True, False)),
        (Layers(teachers=(2,)), None, "sum", (False, False)), (turned, None, "mean", (True, False)),
    ):  # fmt: skip
        hidden, weight = layers.hidden, layers.weight
        for leaf, needed in zip(layers.leaves, wanted, strict=True):
            leaf.requires_grad_(needed)
        arguments = (hidden[0], weight[0], hidden[1:], weight[1:], layers.labels, weights, [0.5] * (len(hidden) - 1))
        arguments += (2.0, 0.3, -100, reduction, *wanted)
        found = opcheck(torch.ops.metadistil.fused_linear_kd.default, arguments, rtol=1e-4, atol=1e-5)
        assert set(found.values()) == {"SUCCESS"}


def test_under_autocast(backend):
    hidden, head = logits(6, 4).requires_grad_(), logits(9, 4, seed=1).requires_grad_()
    theirs = [logits(6, 5)], [logits(9, 5)]
    expected = torch.autograd.grad(fused_linear_kd(hidden, head, *theirs, **SETTINGS), [hidden, head])
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(fused_linear_kd(hidden, head, *theirs, **SETTINGS), [hidden, head])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.05 * b.norm()


# What is refused

h, w = torch.zeros(3, 2), torch.zeros(5, 2)
MISTAKES = {
    "one hidden tensor and one weight; got 0 and 0": {"hidden_t": [], "weight_t": []},
    "one hidden tensor and one weight; got 1 and 2": {"weight_t": [w, w]},
    r"student's hidden \(3, 2\) torch.float32 and weight \(5, 3\)": {"weight_s": torch.zeros(5, 3)},
    r"teacher 0's hidden \(3, 2\) torch.float32 and weight \(5, 2\) torch.float64": {"weight_t": [w.double()]},
    r"student's hidden \(3, 2\) torch.float32 and weight \(2,\)": {"weight_s": w[0]},
    r"student logits are \(2, 5\), teachers' are \(3, 5\)": {"hidden_s": h[1:]},
    "no gradient for teachers": {"hidden_t": [h.clone().requires_grad_()]},
    "no gradient for teachers; detach": {"weight_t": [w.clone().requires_grad_()]},
    "no gradient for weights": {"weights": torch.ones(1, requires_grad=True)},
    "mean or sum here; got 'none'": {"reduction": "none"},
    "temperature must be above 0; got 0": {"temperature": 0},
    r"labels must be int64 \(3,\) .* got torch.int64 \(3, 2\)": {"labels": h.long()},
}


def test_what_does_not_fit_is_refused():
    """Before a backend is asked."""
    fine = {"hidden_s": h, "weight_s": w, "hidden_t": [h], "weight_t": [w], **SETTINGS}
    for says, changes in MISTAKES.items():
        with pytest.raises(ValueError, match=says):
            fused_linear_kd(**fine | changes)


@pytest.mark.parametrize("bad", [-1, 5, -101])
@pytest.mark.parametrize("chunk", [ROW], indirect=True)
def test_labels_out_of_range(bad, backend):
    with pytest.raises(IndexError, match=f"label .*{bad}"):
        fused_linear_kd(h, w, [h], [w], torch.tensor([0, -100, bad]), **SETTINGS)
