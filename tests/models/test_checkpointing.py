"""Checkpointed layers give the gradients of gradients that plain ones give, and keep less on the way."""

import copy
import gc
import weakref
from contextlib import ExitStack, nullcontext
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from scenes import Scene, batch, difference, encoding, network
from small_models import transformer
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from engine.meta.strategies.double_backward import double_backward
from engine.meta.strategies.exact import exact
from engine.models.checkpointing import CHOICES, REFUSED, checkpointed, encoder_layers

# The same operations in the same precision, sums perhaps in another order; without bf16's casts the recomputation would
# be 1.4e-2 away.
TOLERANCE = {torch.float64: 1e-12, torch.bfloat16: 1e-3}
FAMILIES = ("bert", "distilbert", "roberta")
FACTORS = (1.0, 0.5)  # outputs of the layer below


@pytest.fixture(autouse=True)
def math_attention_on_one_thread():
    """Operations this small are not shared among threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.set_num_threads(threads)


def text(family, seed, layers=3, attention="sdpa", dropout=0.1):
    module = network(family, 3, seed, layers=layers, dropout=dropout).module
    module.set_attn_implementation(attention)
    return module


def words(family, seed):
    inputs = dict(batch(seed, 3, size=4).inputs[encoding(family)])
    if family != "bert":
        inputs.pop("token_type_ids", None)
    return inputs


def cnn(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.2), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 3),
    ).double()  # fmt: skip


def teacher_gradient(student, teacher, pilot, quiz, choice, pilots=1, by=checkpointed):
    """Gradient of a quiz loss, by the teacher's parameters, through pilot steps; backward outside the contexts.

    `pilot` and `quiz` give logits [B, C] for (module, parameters or None).
    """
    weights = {n: p for n, p in student.named_parameters() if p.requires_grad}
    with ExitStack() as stack:
        if choice in ("student", "both"):
            stack.enter_context(by(student))
        if choice in ("teachers", "both"):
            stack.enter_context(by(teacher))
        for _ in range(pilots):
            target = pilot(teacher, None)
            loss = F.kl_div(pilot(student, weights).log_softmax(-1), target.softmax(-1), reduction="batchmean")
            gradients = torch.autograd.grad(
                loss, list(weights.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
            weights = {n: p - 0.3 * g for (n, p), g in zip(weights.items(), gradients, strict=True)}
        quiz_loss = quiz(student, weights).square().mean()
    targets = list(teacher.parameters())
    return torch.autograd.grad(quiz_loss, targets, allow_unused=True, materialize_grads=True)


def logits(module, parameters, **inputs):
    out = functional_call(module, parameters or {}, (), inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def pixels(module, parameters, x):
    return functional_call(module, parameters or {}, (x,))


def worst(got, expected):
    scale = max(g.abs().max() for g in expected)
    assert scale > 1e-6, "a teacher without a gradient compares nothing"
    return max(((a - b).abs().max() / scale).item() for a, b in zip(got, expected, strict=True))


# Which layers


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_an_encoder(family):
    module = text(family, 0, layers=2)
    inner = {"bert": "bert.encoder.layer", "distilbert": "distilbert.transformer.layer"}
    layers = encoder_layers(module)
    assert layers == list(module.get_submodule(inner.get(family, "roberta.encoder.layer")))
    assert len(layers) == 2


def test_layers_of_other_modules():
    short, long = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])
    plain = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    holder = nn.Module()
    holder.short, holder.long, holder.plain = short, long, plain
    assert encoder_layers(holder) == list(long)
    assert encoder_layers(nn.Sequential(plain, nn.Tanh())) == list(plain)
    shared = nn.Linear(2, 2)
    assert encoder_layers(nn.Sequential(shared, nn.Tanh(), shared))[0] is shared
    assert len(encoder_layers(nn.Sequential(shared, nn.Tanh(), shared))) == 2


def test_no_layers():
    with pytest.raises(ValueError, match="Linear are not known: it has no nn.ModuleList or nn.Sequential"):
        encoder_layers(nn.Linear(2, 2))
    module = text("bert", 0, layers=2)
    module.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="no nn.ModuleList of 7 layers"), checkpointed(module):
        pass


# The same gradient


@pytest.mark.parametrize("choice", CHOICES[1:])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text(family, attention, train, choice):
    student, teacher = text(family, 0, 2, attention).train(train), text(family, 1, 3, attention).train(train)
    pilot, quiz = (partial(logits, **words(family, seed)) for seed in (5, 6))
    results = []
    for each in ("none", choice):
        torch.manual_seed(0)
        gradient = teacher_gradient(student, teacher, pilot, quiz, each)
        results.append((gradient, torch.get_rng_state()))
    (expected, state), (got, state_after) = results
    assert worst(got, expected) < TOLERANCE[torch.float64]
    assert torch.equal(state, state_after)


@pytest.mark.parametrize("choice", CHOICES[1:])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_images_and_running_statistics(train, choice):
    x = [torch.randn(5, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    results = []
    for each in ("none", choice):
        student, teacher = cnn(0).train(train), cnn(1).train(train)
        torch.manual_seed(0)
        pilot, quiz = partial(pixels, x=x[0]), partial(pixels, x=x[1])
        gradient = teacher_gradient(student, teacher, pilot, quiz, each, pilots=2)
        results.append((gradient, [*student.buffers(), *teacher.buffers()]))
    (expected, buffers), (got, buffers_after) = results
    assert worst(got, expected) < TOLERANCE[torch.float64]
    assert all(torch.equal(a, b) for a, b in zip(buffers, buffers_after, strict=True)), "a batch was counted twice"


@pytest.mark.parametrize("strategy", [double_backward, exact], ids=["double_backward", "exact"])
@pytest.mark.parametrize("student", FAMILIES)
def test_strategies(student, strategy):
    """The quiz runs in eval mode and is differentiated in train mode; `exact` passes through in forward mode."""
    scene = Scene(student, ["bert", "roberta"], pilots=2, quizzes=2)
    losses, expected, state = scene.run(strategy)
    with ExitStack() as stack:
        for each in [scene.student, *scene.teachers]:
            stack.enter_context(checkpointed(each.module))
        losses_2, got, state_2 = scene.run(strategy)
    assert difference(got, expected) < TOLERANCE[torch.float64]
    assert losses == losses_2
    assert torch.equal(state, state_2)


def test_autocast():
    student, teacher = (text("bert", seed, 2).float().train() for seed in (0, 1))

    def forward(module, parameters):
        with torch.autocast("cpu", torch.bfloat16):
            return logits(module, parameters, **words("bert", 5)).float()

    results = []
    for choice in ("none", "both"):
        torch.manual_seed(0)
        results.append(teacher_gradient(student, teacher, forward, forward, choice))
    assert worst(*results[::-1]) < TOLERANCE[torch.bfloat16]
    assert {g.dtype for g in results[1]} == {torch.float32}


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_the_forwards_attention_counts(before):
    """An additive mask is what eager attention takes, a boolean one what sdpa does; MATH alone has second derivatives."""
    # without dropout, which the fused kernels of a CPU leave to MATH
    student, teacher = (text("bert", seed, 2, before).eval() for seed in (0, 1))
    inputs, after = words("bert", 5), {"eager": "sdpa", "sdpa": "eager"}[before]
    mask = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 8, -1)
    inputs["attention_mask"] = mask if before == "sdpa" else torch.where(mask, 0.0, -1e9).double()

    def forward(module, parameters):
        for m in (student, teacher):
            m.config._attn_implementation = before
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return logits(module, parameters, **inputs)
        finally:
            for m in (student, teacher):
                m.config._attn_implementation = after

    results = []
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        for choice in ("none", "both"):
            torch.manual_seed(0)
            results.append(teacher_gradient(student, teacher, forward, forward, choice))
            assert student.config._attn_implementation == after
            assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert worst(*results[::-1]) < TOLERANCE[torch.float64]


class Odd(nn.Module):
    """Layers with keyword arguments that return nested values: a tuple with None, a number and integers in it."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, scales=None, *, mask, power):
            h = (self.linear(x) * mask).tanh()
            return h, None, {"squares": h**power, "half": scales[1] * h, "which": h.argmax(-1)}, power

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.Layer() for _ in range(3)])

    def forward(self, x, mask):
        for layer in self.layers:
            x, nothing, others, power = layer(x, FACTORS, mask=mask, power=2)
            assert nothing is None and power == 2 and others["which"].dtype == torch.int64
            assert not others["which"].requires_grad
            x = x + others["squares"] * others["half"]
        return x


def test_tuples_and_keywords():
    torch.manual_seed(0)
    student, teacher = Odd().double(), Odd().double()
    x, mask = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64, requires_grad=True)

    def forward(module, parameters):
        return functional_call(module, parameters or {}, (x, mask))

    expected = teacher_gradient(student, teacher, forward, forward, "none")
    assert worst(teacher_gradient(student, teacher, forward, forward, "both"), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states(family):
    module, inputs = text(family, 0), words(family, 5)

    def gradients():
        torch.manual_seed(0)
        states = module(**inputs, output_hidden_states=True).hidden_states
        assert len(states) == 4
        loss = sum((k + 1) * s.square().mean() for k, s in enumerate(states))
        return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)

    expected = gradients()
    with checkpointed(module):
        got = gradients()
    assert [g is None for g in got] == [g is None for g in expected]
    assert worst(*([g for g in each if g is not None] for each in (got, expected))) < TOLERANCE[torch.float64]


def test_an_input_that_comes_twice_counts_twice():
    class Twice(nn.Module):
        def forward(self, x, y):
            return x * y

    holder = nn.Module()
    holder.layers = nn.ModuleList([Twice()])
    x = torch.tensor([3.0], requires_grad=True)
    y = 2 * x
    with checkpointed(holder):
        (first,) = torch.autograd.grad(holder.layers[0](y, y), x, create_graph=True)  # (2 x)^2
        (mixed,) = torch.autograd.grad(holder.layers[0](x, x.exp()), x, create_graph=True)  # x exp(x)
    assert first.item() == 24 and torch.autograd.grad(first, x)[0].item() == 8
    torch.testing.assert_close(mixed, x.exp() * (1 + x))
    torch.testing.assert_close(torch.autograd.grad(mixed, x)[0], x.exp() * (2 + x))


# What is left behind, and what is refused


def test_the_module_is_left_alone():
    module, inputs = text("bert", 0).eval(), words("bert", 5)
    before = {name: dict(m.__dict__) for name, m in module.named_modules()}
    plain = module(**inputs).logits
    with pytest.raises(ZeroDivisionError), checkpointed(module):
        assert torch.equal(module(**inputs).logits, plain)
        with torch.no_grad():
            assert not module(**inputs).logits.requires_grad
        raise ZeroDivisionError
    after = {name: dict(m.__dict__) for name, m in module.named_modules()}
    assert after.keys() == before.keys()
    assert all(after[n].keys() == before[n].keys() for n in before)
    assert not any("forward" in d for d in after.values())
    # an instance's own forward, such as another library's wrapper, comes back
    layer = encoder_layers(module)[0]
    layer.forward = mine = layer.forward
    with checkpointed(module):
        assert layer.forward is not mine
    assert layer.forward is mine


def test_the_forwards_state_counts_and_not_the_backwards():
    """Mode, buffers and random state have changed when the layers run again, and stay as they are."""
    module = cnn(0).train()
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64)
    for train in (True, False):
        results = []
        for context in (nullcontext, partial(checkpointed, module)):
            started = copy.deepcopy(module.state_dict())
            torch.manual_seed(0)
            module.train(train)
            with context():
                loss = module(x).square().sum()
            module.train(not train)
            module[1].running_mean = module[1].running_mean + 1
            torch.manual_seed(1)
            buffers = [b.clone() for b in module.buffers()]
            results.append(torch.autograd.grad(loss, list(module.parameters())))
            assert all(torch.equal(a, b) for a, b in zip(buffers, module.buffers(), strict=True))
            assert torch.equal(torch.get_rng_state(), torch.manual_seed(1).get_state())
            assert all(m.training is not train for m in module.modules())
            module.load_state_dict(started)
        assert worst(results[1], results[0]) < TOLERANCE[torch.float64]


def test_an_overwritten_weight_is_noticed():
    module = cnn(0)
    with checkpointed(module):
        loss = module(torch.randn(5, 1, 6, 6, dtype=torch.float64)).sum()
    with torch.no_grad():
        module[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_kept_graph_is_differentiated_twice():
    module = text("bert", 0)
    with checkpointed(module):
        loss = module(**words("bert", 5)).logits.square().sum()
    parameters = list(module.parameters())
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=keep) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_layer_with_an_embedding_runs_as_it_is():
    """Hooks put leaves in the place of looked-up rows (engine.params.flat), in layers too."""
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Tanh())
    leaves = []

    def hook(module, args, out):
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    module[0].register_forward_hook(hook)
    layer = nn.Sequential(module)
    holder = nn.Module()
    holder.layers = nn.ModuleList([layer, nn.Linear(4, 2), nn.Linear(2, 2)])
    with checkpointed(holder):
        assert "forward" not in layer.__dict__ and "forward" in holder.layers[1].__dict__
        x = torch.arange(3)
        for each in holder.layers:
            x = each(x)
    assert torch.autograd.grad(x.sum(), leaves)[0].any()


def test_a_third_derivative_raises():
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    x = torch.randn(3, 2, requires_grad=True)
    with checkpointed(module):
        (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    torch.autograd.grad(first.square().sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="two derivatives"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


def selective(layer, *args):
    def policy(ctx, op, *args, **kwargs):
        saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(layer, *args, use_reentrant=False, context_fn=contexts)


def reentrant(layer, *args):
    return checkpoint(layer, *args, use_reentrant=True)


@pytest.mark.parametrize(
    ("kind", "run", "message"),
    [("selective", selective, "backward an extra time"), ("reentrant", reentrant, "incompatible with .grad")],
)
def test_the_reasons_of_a_refusal_are_true(kind, run, message):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(3, 4, requires_grad=True)

    def second_derivative(forward):
        (first,) = torch.autograd.grad(forward(layer, x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    second_derivative(lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    with pytest.raises(RuntimeError, match=message):
        second_derivative(run)
    assert kind in REFUSED
    run(layer, x).sum().backward()  # of first order both work


def test_every_refusal_has_a_reason():
    assert set(REFUSED) == {"selective", "reentrant"} and not set(REFUSED) & set(CHOICES)


# Memory


class Live(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, from its making until it is freed."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key, size):
        self.known.discard(key)
        self.now -= size


def torch_checkpointed(module):
    """What one would write without engine.models.checkpointing: each layer in torch.utils.checkpoint."""
    stack = ExitStack()
    for layer in encoder_layers(module):
        stack.callback(layer.__dict__.pop, "forward")

        def forward(*args, inner=layer.forward, layer=layer, **kwargs):
            weights = dict(layer.named_parameters())

            def body(*args, **kwargs):
                ours = layer.__dict__.pop("forward", None)
                try:
                    return functional_call(layer, weights, args, kwargs)
                finally:
                    if ours is not None:
                        layer.__dict__["forward"] = ours

            return checkpoint(body, *args, use_reentrant=False, **kwargs)

        layer.__dict__["forward"] = forward
    return stack


@cache
def peak(choice, pilots=1, by=checkpointed):
    """Bytes at once, at the most, of all that a meta-gradient of models with large activations makes; and the gradient."""
    student, teacher = (transformer("bert", seed, layers=6, width=16, words=20, positions=32) for seed in (0, 1))
    inputs = {"input_ids": torch.randint(20, (16, 32), generator=torch.Generator().manual_seed(0))}
    run = partial(logits, **inputs)
    gc.collect()
    with Live() as live:
        gradient = teacher_gradient(student, teacher, run, run, choice, pilots, by)
    return live.peak, gradient


def test_memory():
    (none, expected), (teachers, _), (student, _), (both, got) = (
        peak(c) for c in ("none", "teachers", "student", "both")
    )
    assert worst(got, expected) < 1e-5
    assert teachers < 0.9 * none and student < 0.5 * none and both < 0.3 * none


def test_memory_of_more_pilots():
    """Each pilot adds its layers' inputs, not its activations. In the graph of a pilot's gradient torch's own checkpoint keeps
    what it recomputed, which is the reason for ours."""
    growth = {c: peak(c, 3)[0] - peak(c)[0] for c in ("none", "student", "both")}
    theirs = peak("student", 3, torch_checkpointed)[0] - peak("student", 1, torch_checkpointed)[0]
    assert growth["both"] < 0.2 * growth["none"]
    assert theirs > 0.9 * growth["none"] and growth["student"] < 0.5 * growth["none"]  # the teacher's are among both
