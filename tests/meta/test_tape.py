"""The tape: what it records is a plain forward, bit for bit, and what it replays is plain forward mode, to rounding."""

import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from small_models import WORDS, transformer
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.meta.tape import Tape, UnrecordedRandomness

# Largest difference of a tangent over its largest entry. The sums run in another order, and in bf16 (8 bits) plain
# forward mode rounds after every pass where a rule here has one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def math_attention():
    with sdpa_kernel(SDPBackend.MATH):
        yield


def words():
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 6, 2])[:, None]).long()  # [B, L]
    return {"input_ids": torch.randint(2, WORDS, mask.shape) * mask, "attention_mask": mask}


class Block(nn.Module):
    """Inputs named like those of a transformer's, results too; operations in place where they are likely."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Attention(nn.Module):
    """Fused attention without its dropout, a product of two activations, sums and products with constants."""

    def __init__(self):
        super().__init__()
        self.qkv, self.gate, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 2, 12).transpose(1, 2).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.dropout(torch.tanh(self.gate(x)) * h * 0.5 + h + 1.0, 0.2)
        h = (2.0 * h + x).softmax(-1) @ self.out.weight.T
        h += self.out.bias
        return h.mean(1)


class InPlace(nn.Module):
    """A sum shares its tangent with what it was made of, which an operation in place has to leave alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        h = self.layer(x) + 1.0
        g = h + 0.5
        g.mul_(3.0)
        return h * g


def cnn():
    return Block(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.SiLU(inplace=True), nn.Dropout2d(0.0), nn.Flatten(),
        nn.Linear(36, 3),
    ), {"x": torch.randn(5, 2, 8, 8)}  # fmt: skip


def mlp():
    return Block(
        nn.Linear(4, 16), nn.Dropout(0.3, inplace=True), nn.GELU("tanh"), nn.LayerNorm(16), nn.Dropout(0.0),
        nn.Linear(16, 16), nn.LayerNorm(16, elementwise_affine=False), nn.Dropout(1.0), nn.Linear(16, 16),
        nn.LayerNorm(16, bias=False), nn.Softmax(-1), nn.Linear(16, 3),
    ), {"x": torch.randn(5, 4)}  # fmt: skip


def conv1d():
    layers = nn.Conv1d(2, 4, 3), nn.GELU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(24, 3)
    return Block(*layers), {"x": torch.randn(5, 2, 8)}


MODELS = {
    "bert": lambda: (transformer("bert", attention="eager", spread=0.4), words()),
    "distilbert": lambda: (transformer("distilbert", attention="eager", spread=0.4), words()),
    "roberta": lambda: (transformer("roberta", attention="eager", spread=0.4), words()),
    "bert-sdpa": lambda: (transformer("bert", attention_dropout=0.0, spread=0.4), words()),
    "bert-sdpa-dropout": lambda: (transformer("bert", spread=0.4), words()),
    "distilbert-sdpa-dropout": lambda: (transformer("distilbert", spread=0.4), words()),
    "cnn": cnn,
    "mlp": mlp,
    "conv1d": conv1d,
    "attention": lambda: (Attention(), {"x": torch.randn(5, 7, 8)}),
    "in place": lambda: (InPlace(), {"x": torch.randn(5, 4)}),
}


class Scene:
    """A student in train mode, its inputs, a direction, and the generator's state before every forward."""

    def __init__(self, model, dtype=torch.float64, autocast=False):
        torch.manual_seed(0)
        self.module, inputs = MODELS.get(model, model)()
        self.module.to(dtype).train()
        self.inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
        self.autocast = autocast
        self.weights = dict(self.module.named_parameters())
        self.v = {n: torch.randn_like(p) for n, p in self.weights.items()}
        self.buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        self.generator = torch.get_rng_state()

    def forward(self, parameters=None):
        for name, buffer in self.module.named_buffers():
            buffer.data.copy_(self.buffers[name])  # as the time machine does, which leaves kept graphs valid
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            out = functional_call(self.module, parameters or {}, (), self.inputs)
        return out if isinstance(out, torch.Tensor) else out.logits

    def restart(self):
        torch.set_rng_state(self.generator)

    def forward_mode(self, frozen=(), context=nullcontext):
        """Logits and their tangent from wherever the generator stands."""
        with torch.no_grad(), forward_ad.dual_level(), context():
            duals = {n: forward_ad.make_dual(p, self.v[n]) for n, p in self.weights.items() if n not in frozen}
            return tuple(forward_ad.unpack_dual(self.forward(duals)))

    def plain(self, frozen=()):
        self.restart()
        return self.forward_mode(frozen)

    def gradients(self, logits):
        weights = list(self.weights.values())
        gradients = torch.autograd.grad(logits.square().sum(), weights, allow_unused=True, materialize_grads=True)
        return [g.flatten() for g in gradients]

    def record(self):
        tape = Tape()
        self.restart()
        with tape.recording():
            logits = self.forward()
        return tape, logits

    def replay(self, tape, frozen=()):
        return self.forward_mode(frozen, tape.replaying)


def assert_close(a, b, dtype):
    assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()


PRECISIONS = {
    "fp64": (torch.float64, False),
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_recording_is_a_plain_forward(model, precision):
    """Logits, buffers, the generator after and gradients, bit for bit."""
    scene, found, gradients = Scene(model, *PRECISIONS[precision]), [], []
    for run in (scene.forward, lambda: scene.record()[1]):
        scene.restart()
        logits = run()
        found.append([logits, *(b.clone() for b in scene.module.buffers()), torch.get_rng_state()])
        gradients.append(scene.gradients(logits))
    assert all(map(torch.equal, *found))
    if precision in ("fp64", "fp32"):
        assert all(map(torch.equal, *gradients))
    else:  # F.dropout on the CPU rounds its factor 1 / (1 - p) to 8 bits; this graph does not
        assert_close(torch.cat(gradients[1]), torch.cat(gradients[0]), torch.bfloat16)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_replay_is_forward_mode(model, precision):
    """A tape may be replayed again; a replay draws nothing, and leaves the graph that shares its tensors as it was."""
    scene = Scene(model, *PRECISIONS[precision])
    logits, u = scene.plain()
    kept = scene.gradients(scene.record()[1])
    tape, recorded = scene.record()
    drawn = torch.get_rng_state()
    for _ in range(2):
        replayed, tangent = scene.replay(tape)
        assert torch.equal(replayed, recorded) and torch.equal(torch.get_rng_state(), drawn)
        assert tangent.dtype == u.dtype and u.abs().max() > 0
        assert_close(tangent, u, torch.bfloat16 if precision == "autocast" else PRECISIONS[precision][0])
        if precision == "fp64":
            assert_close(replayed, logits, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(kept, scene.gradients(recorded), strict=True))


FROZEN = {
    "first half": lambda names: names[: len(names) // 2],
    "second half": lambda names: names[len(names) // 2 :],
    "weights": lambda names: [n for n in names if n.endswith("weight")],
    "biases": lambda names: [n for n in names if n.endswith("bias")],
    "all but the last": lambda names: names[:-1],
    "all": lambda names: names,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(model, frozen):
    scene = Scene(model)
    names = FROZEN[frozen](list(scene.weights))
    _, u = scene.plain(names)
    tape, _ = scene.record()
    _, tangent = scene.replay(tape, names)
    assert (tangent is None) == (u is None)
    if u is not None:
        assert_close(tangent, u, torch.float64)


def test_arguments_by_keyword_and_from_numbers():
    layer, norm = nn.Linear(3, 3, dtype=torch.float64), nn.LayerNorm(3, dtype=torch.float64)

    def forward(x):
        h = F.linear(weight=layer.weight, input=x)
        h = F.dropout(training=True, input=h, p=0.5) + F.gelu(input=x, approximate="tanh")
        h = F.softmax(dim=-1, input=h) + torch.softmax(h, 0) * 2 + h.softmax(1, dtype=torch.float32)
        h = F.layer_norm(weight=norm.weight, normalized_shape=(3,), input=1 + 3 * h)
        return torch.matmul(other=h.T, input=torch.add(h, x, alpha=2)) + torch.arange(4)

    x, x_t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    state, tape = torch.get_rng_state(), Tape()
    with tape.recording():
        recorded = forward(x)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x_t)
        torch.set_rng_state(state)
        _, u = forward_ad.unpack_dual(forward(dual))
        with tape.replaying():
            replayed, tangent = forward_ad.unpack_dual(forward(dual))
    assert torch.equal(replayed, recorded)
    assert_close(tangent, u, torch.float32)  # one of the softmaxes is


@pytest.mark.parametrize("mode", ["shape", "fewer", "more", "order", "eval"])
def test_another_sequence_is_refused(mode):
    layers = [nn.Linear(4, 4), nn.GELU(), nn.Dropout(0.5)]
    module, x = nn.Sequential(*layers).train(), torch.randn(3, 4)
    tape = Tape()
    with tape.recording():
        module(x)
    if mode == "shape":
        x = x[:2]
    elif mode == "eval":
        module.eval()
    else:
        module = nn.Sequential(*{"fewer": layers[:2], "more": layers * 2, "order": layers[::-1]}[mode])
    with (
        pytest.raises(RuntimeError, match="not a fixed sequence of operations"),
        torch.no_grad(),
        forward_ad.dual_level(),
        tape.replaying(),
    ):
        module(x)


def drawing():
    return Block(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.5), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)), {
        "x": torch.randn(5, 2, 8, 8)
    }


def test_unrecorded_randomness():
    """A dropout that the tape does not know; the caller falls back to plain forward mode."""
    scene = Scene(drawing)
    tape, logits = scene.record()
    with pytest.raises(UnrecordedRandomness, match=r"F\.dropout"):
        scene.replay(tape)
    replayed, _ = scene.plain()
    assert torch.equal(replayed, logits)


def test_fused_attention_has_a_tangent():
    """Recorded with a fused kernel, which has no forward mode of its own, beside math attention's."""
    scene = Scene("bert-sdpa")
    _, u = scene.plain()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        tape, logits = scene.record()
        replayed, tangent = scene.replay(tape)
    held = [entry.probabilities for entry in tape._entries if entry.call[0] == "attention"]
    assert held == [None, None]
    assert torch.equal(replayed, logits)
    assert_close(tangent, u, torch.float64)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("mask", [None, "bool", "all false", "float"])
@pytest.mark.parametrize("scale", [None, 0.7, -0.7])
def test_attention(dropout_p, mask, scale):
    """The math kernel by its parts: bits, draws and gradients of the kernel; tangents of forward mode."""
    torch.manual_seed(0)
    q, k, v, *tangents = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(6))
    if mask == "float":
        mask = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    elif mask is not None:
        mask = torch.rand(2, 1, 5, 5) < (0.6 if mask == "bool" else 0.0)
    state = torch.get_rng_state()

    def run(*qkv, context=nullcontext):
        torch.set_rng_state(state)
        with context():
            out = F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=dropout_p, scale=scale)
            out.mul_(2.0)  # over what the tape holds
        return out

    tape, found = Tape(), []
    for context in (nullcontext, tape.recording):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = run(*leaves, context=context)
        found.append([out, torch.get_rng_state(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip((q, k, v), tangents, strict=True)]
        plain, u = forward_ad.unpack_dual(run(*duals))
        torch.set_rng_state(state)
        with tape.replaying():
            out = F.scaled_dot_product_attention(*duals, attn_mask=mask, dropout_p=dropout_p, scale=scale)
            out.mul_(2.0)
        replayed, tangent = forward_ad.unpack_dual(out)
    assert torch.equal(replayed, plain)
    assert_close(tangent, u, torch.float64)


def test_errors():
    layer, x, tape = nn.Linear(2, 2), torch.randn(1, 2), Tape()

    def assert_nothing_is_held():
        with pytest.raises(RuntimeError, match="Nothing is recorded"), torch.no_grad(), tape.replaying():
            layer(x)

    assert_nothing_is_held()
    with tape.recording():
        layer(x)
    held = weakref.ref(tape._entries[0].output)
    with pytest.raises(RuntimeError, match="no_grad"), tape.replaying():
        layer(x)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), tape.replaying():  # not hidden by the tape's own checks
        raise ZeroDivisionError
    tape.clear()
    assert held() is None
    assert_nothing_is_held()
    with pytest.raises(ZeroDivisionError), tape.recording():
        layer(x)
        raise ZeroDivisionError
    assert_nothing_is_held()
