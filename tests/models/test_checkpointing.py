"""Checkpointed layers give the gradients of gradients that plain ones give, and keep less on the way."""

from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scenes import network, words
from small_models import transformer
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from engine.models.checkpointing import REFUSED, _Body, checkpointed
from engine.models.encoder_layers import encoder_layers
from engine.profiling.allocated import allocated

TOLERANCE = 1e-12  # float64, the same operations, sums perhaps in another order
FAMILIES = ("bert", "distilbert", "roberta")


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


def cnn(seed):
    return network("cnn", 3, seed).module


def worst(got, expected):
    scale = max(g.abs().max() for g in expected)
    assert scale > 1e-6, "a model without a gradient compares nothing"
    return max(((a - b).abs().max() / scale).item() for a, b in zip(got, expected, strict=True))


def assert_the_same(module, forward, tolerance=TOLERANCE):
    """With and without checkpoints: the gradients of a loss and of its gradient's norm, and the random state after them.

    `forward` gives numbers [...] for the module; the backward is outside the context.
    """
    weights, results = list(module.parameters()), []
    gradients = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
    for context in (nullcontext, checkpointed):
        torch.manual_seed(0)
        with context(module):
            loss = forward(module).square().mean()
        first = gradients(loss, weights, create_graph=True)
        results.append((first, gradients(sum(g.square().sum() for g in first), weights), torch.get_rng_state()))
    expected, got = results
    assert worst(got[0], expected[0]) < TOLERANCE and worst(got[1], expected[1]) < tolerance
    assert torch.equal(got[2], expected[2])
    return got[1]


# Which layers; those of encoders are counted in test_teacher_params.py


def test_layers_of_other_modules():
    short, long = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])
    plain = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    holder = nn.Module()
    holder.short, holder.long, holder.plain = short, long, plain
    assert encoder_layers(holder) == list(long)
    assert encoder_layers(nn.Sequential(plain, nn.Tanh())) == list(plain)
    shared, tanh = nn.Linear(2, 2), nn.Tanh()
    assert encoder_layers(nn.Sequential(shared, tanh, shared)) == [shared, tanh]
    with pytest.raises(ValueError, match="Linear are not known: it has no nn.ModuleList or nn.Sequential"):
        encoder_layers(nn.Linear(2, 2))
    module = text("bert", 0, layers=2).bert  # no classifier, so that no record says where its layers stand
    module.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="no nn.ModuleList of 7 layers"), checkpointed(module):
        pass


# The same gradient; through every strategy in tests/meta/test_strategies.py


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text(family, attention, train):
    """Hidden states, which hooks on the layers collect, are part of the loss."""

    def forward(module):
        out = module(**words(family, 6), output_hidden_states=True)
        assert len(out.hidden_states) == 3
        return torch.cat([out.logits, *(k * h.mean(1) for k, h in enumerate(out.hidden_states))], 1)

    assert_the_same(text(family, 0, 2, attention).train(train), forward)


def test_autocast():
    def forward(module):
        with torch.autocast("cpu", torch.bfloat16):
            return module(**words("bert", 5)).logits.float()

    # the second derivative adds numbers of 8 bits in another order: seen 9e-3. Without the casts the first is 5e-3 away
    got = assert_the_same(text("bert", 0, 2).float(), forward, tolerance=2e-2)
    assert {g.dtype for g in got} == {torch.float32}


@pytest.mark.parametrize(("before", "after"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_the_forwards_attention_counts(before, after):
    """An additive mask is what eager attention takes, a boolean one what sdpa does; MATH alone has second derivatives."""
    module = text("bert", 0, 2, before).eval()  # without dropout, which the fused kernels of a CPU leave to MATH
    inputs = words("bert", 5)
    mask = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 8, -1)
    inputs["attention_mask"] = mask if before == "sdpa" else torch.where(mask, 0.0, -1e9).double()

    def forward(module):
        module.config._attn_implementation = before
        with sdpa_kernel(SDPBackend.MATH):
            out = module(**inputs).logits
        module.config._attn_implementation = after
        return out

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        assert_the_same(module, forward)
        assert module.config._attn_implementation == after
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


class OddLayer(nn.Linear):
    """Takes keyword arguments, and returns nested values: a tuple with None, a number and integers in it."""

    def forward(self, x, scales=None, *, mask, power):
        h = (super().forward(x) * mask).tanh()
        return h, None, {"squares": h**power, "half": scales[1] * h, "which": h.argmax(-1)}, power


class Odd(nn.Sequential):
    def forward(self, x, mask):
        for layer in self:
            x, nothing, others, power = layer(x, (1.0, 0.5), mask=mask, power=2)
            assert nothing is None and power == 2 and others["which"].dtype == torch.int64
            assert not others["which"].requires_grad
            x = x + others["squares"] * others["half"]
        return x


def test_tuples_and_keywords():
    torch.manual_seed(0)
    module = Odd(*(OddLayer(4, 4) for _ in range(3))).double()
    x, mask = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert_the_same(module, lambda module: module(x, mask))


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
    """Also where a layer has a forward of its own, such as another library's wrapper, and after an error."""
    module, inputs = text("bert", 0).eval(), words("bert", 5)
    layer = encoder_layers(module)[0]
    layer.forward = layer.forward
    before = {name: dict(m.__dict__) for name, m in module.named_modules()}
    plain = module(**inputs).logits
    with pytest.raises(ZeroDivisionError), checkpointed(module):
        assert layer.forward is not before["bert.encoder.layer.0"]["forward"]
        assert torch.equal(module(**inputs).logits, plain)
        with torch.no_grad():
            assert not module(**inputs).logits.requires_grad
        raise ZeroDivisionError
    assert {name: dict(m.__dict__) for name, m in module.named_modules()} == before


@pytest.mark.parametrize("train", [True, False])
def test_the_forwards_state_counts_and_not_the_backwards(train):
    """Mode, buffers and random state have changed when the layers run again, and stay as they are."""
    x, results = torch.randn(5, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), []
    for context in (nullcontext, checkpointed):
        module = cnn(0).train(train)
        with context(module):
            loss = module(x).square().sum()
        module.train(not train)
        module[1].running_mean = module[1].running_mean + 1
        random, buffers = torch.manual_seed(1).get_state(), [b.clone() for b in module.buffers()]
        results.append((torch.autograd.grad(loss, list(module.parameters())), buffers))
        assert all(torch.equal(a, b) for a, b in zip(buffers, module.buffers(), strict=True))
        assert torch.equal(torch.get_rng_state(), random)
        assert all(m.training is not train for m in module.modules())
    (expected, statistics), (got, statistics_after) = results
    assert worst(got, expected) < TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(statistics, statistics_after, strict=True))


def test_how_often_a_graph_is_differentiated():
    """Again and again, but twice at the most in a row, and not with weights that were overwritten."""
    module, gradients = text("bert", 0), partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
    with checkpointed(module):
        loss = module(**words("bert", 5)).logits.square().sum()
    parameters = list(module.parameters())
    first, second = (gradients(loss, parameters) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    norm = sum(g.square().sum() for g in gradients(loss, parameters, create_graph=True))
    assert any(g is not None and g.any() for g in gradients(norm, parameters))
    with pytest.raises(RuntimeError, match="two derivatives"):
        gradients(norm, parameters, create_graph=True)
    with torch.no_grad():
        next(encoder_layers(module)[0].parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_layer_with_an_embedding_runs_as_it_is():
    """Hooks put leaves in the place of looked-up rows (engine.params.flat), in layers too."""
    leaves = []

    def hook(module, args, out):
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    layers = nn.Sequential(nn.Sequential(nn.Embedding(9, 4), nn.Tanh()), nn.Linear(4, 2), nn.Linear(2, 2))
    layers[0][0].register_forward_hook(hook)
    with checkpointed(layers):
        assert "forward" not in layers[0].__dict__ and "forward" in layers[1].__dict__
        out = layers(torch.arange(3))
    assert torch.autograd.grad(out.sum(), leaves)[0].any()


def test_the_reasons_of_a_refusal_are_true():
    """With what is refused, torch gives a first derivative and no second one."""
    layer, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(3, 4, requires_grad=True)
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    how = {"selective": {"use_reentrant": False, "context_fn": kept}, "reentrant": {"use_reentrant": True}}
    assert how.keys() == REFUSED.keys()
    for settings in how.values():
        checkpoint(layer, x, **settings).sum().backward()
        with pytest.raises(RuntimeError, match=r"backward an extra time|incompatible with .grad"):
            torch.autograd.grad(checkpoint(layer, x, **settings).square().sum(), x, create_graph=True)[
                0
            ].sum().backward()


# Memory


def theirs(body, *args, **kwargs):
    return checkpoint(functional_call, body, dict(body.named_parameters()), args, kwargs, use_reentrant=False)


@contextmanager
def torch_checkpointed(module):
    """What one would write without engine.models.checkpointing: each layer in torch.utils.checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        for layer in encoder_layers(module):
            patch.setitem(layer.__dict__, "forward", partial(theirs, _Body(layer)))
        yield


def peak(choice, pilots=1, by=checkpointed):
    """Bytes at once, at the most, of all that a meta-gradient of models with large activations makes; and the gradient."""
    student, teacher = (transformer("bert", seed, layers=6, width=16, words=20, positions=32) for seed in (0, 1))
    inputs = {"input_ids": torch.randint(20, (8, 32), generator=torch.Generator().manual_seed(0))}
    found = []
    bytes_at_once = allocated(lambda: found.append(meta_gradient(student, teacher, inputs, choice, pilots, by)))
    return bytes_at_once, found[0]


def meta_gradient(student, teacher, inputs, choice, pilots, by):
    weights = dict(student.named_parameters())
    with ExitStack() as stack:
        for module, chosen in ((student, ("student", "both")), (teacher, ("teachers", "both"))):
            stack.enter_context(by(module) if choice in chosen else nullcontext())
        for _ in range(pilots):
            target = teacher(**inputs).logits.softmax(-1)
            found = functional_call(student, weights, (), inputs).logits.log_softmax(-1)
            loss = F.kl_div(found, target, reduction="batchmean")
            gradients = torch.autograd.grad(
                loss, list(weights.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
            weights = {n: p - 0.3 * g for (n, p), g in zip(weights.items(), gradients, strict=True)}
        quiz_loss = functional_call(student, weights, (), inputs).logits.square().mean()
        return torch.autograd.grad(quiz_loss, list(teacher.parameters()), allow_unused=True, materialize_grads=True)


def test_memory():
    """A further pilot adds its layers' inputs, not its activations."""
    torch.manual_seed(0)
    (none, expected), (both, got) = peak("none"), peak("both")
    assert worst(got, expected) < 1e-5 and both < 0.3 * none
    assert peak("both", 2)[0] - both < 0.2 * (peak("none", 2)[0] - none)


@pytest.mark.slow
def test_memory_of_every_choice():
    """In the graph of a pilot's gradient torch's own checkpoint keeps what it recomputed, which is the reason for ours."""
    torch.manual_seed(0)
    none, teachers, student = (peak(choice)[0] for choice in ("none", "teachers", "student"))
    assert teachers < 0.9 * none and student < 0.5 * none
    growth = peak("none", 2)[0] - none
    assert peak("student", 2)[0] - student < 0.5 * growth  # the teacher's are among both
    assert peak("student", 2, torch_checkpointed)[0] - peak("student", 1, torch_checkpointed)[0] > 0.9 * growth
