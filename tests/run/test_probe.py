"""Two examples through every model before anything is trained: nothing is changed, and what cannot work is refused."""

import pytest
import torch
from run_helpers import flags
from torch import nn

from engine import cli
from engine.errors import UserError
from engine.models import network
from engine.models.load import load_model
from engine.run import job, members
from engine.run.probe import probe
from engine.screen.console import Console


def set_up(data, **settings):
    return job.set_up(cli.parse(flags(data, **settings)), Console())


def state(setup):
    """All that a probe could change: random numbers, weights, buffers, gradients, modes, and what stands in the modules."""
    found = [torch.get_rng_state()]
    for each in [setup.models.student.network, *setup.models.taught()]:
        found += [t.clone() for t in each.module.state_dict().values()]
        found += [p.grad for p in each.module.parameters()]
        found += [(name, type(m), m.training, set(vars(m))) for name, m in each.module.named_modules()]
        found += [each.inner, each._flat, vars(each.module.config).copy()]
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"pilot_steps": 2, "checkpointing": "both", "feature_loss": "patient", "teacher_weights": "learned", "teachers": "bert,bert2"},
        {"method": "lgtm", "pilot_optimizer": "adamw", "precision": "bf16", "teacher_params": "last-1"},
        {"method": "kd", "feature_loss": "tinybert", "precision": "bf16"},
        {"method": "finetune"},
        {"method": "reptile"},
    ],
)  # fmt: skip
def test_nothing_is_changed(settings, data, monkeypatch):
    monkeypatch.setattr(job, "probe", lambda setup: None)
    setup = set_up(data, **settings)
    before = state(setup)
    probe(setup)
    for one, other in zip(before, state(setup), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


class NoJvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, dy):
        return dy


def by_width(module, args, kwargs, out):
    out.logits = out.logits + kwargs["input_ids"].shape[1] / 10
    return out


def no_jvp(module, args, kwargs, out):
    out.logits = NoJvp.apply(out.logits)
    return out


def not_finite(module, args, kwargs, out):
    out.logits = out.logits + (out.logits * 0).sqrt()
    return out


def only_short(module, args, kwargs, out):
    assert kwargs["input_ids"].shape[1] < 12, "too long"
    return out


def other_layers(module, args, kwargs, out):
    module.dropout = nn.Identity()
    return out


def stateless(module, args, kwargs, out):
    out.hidden_states = None
    return out


@pytest.fixture
def hooked(monkeypatch):
    def hook(function):
        def loaded(*args):
            found = load_model(*args)
            found.module.register_forward_hook(function, with_kwargs=True)
            return found

        monkeypatch.setattr(members, "load_model", loaded)

    return hook


@pytest.mark.parametrize(
    ("hook", "settings", "said"),
    [
        (no_jvp, {}, "without forward-mode derivatives.*use --meta-grad double_backward"),
        (not_finite, {}, "distilbert .distilbert. taught by bert .bert. has no meta-gradient with --feature-loss none, --meta-grad exact.*not finite"),
        (not_finite, {"method": "kd"}, "has no gradient with --feature-loss none .*not finite.; give other models"),
        (not_finite, {"method": "kd", "precision": "bf16"}, "; use --precision fp32, or give other models"),
        (not_finite, {"checkpointing": "both"}, "; use --checkpointing none or --meta-grad double_backward, or give other models"),
        (only_short, {}, "distilbert .distilbert. cannot read texts .AssertionError: too long.; give another model"),
        (stateless, {"data": "sst2", "method": "metakd", "domain_column": "domain"}, "bert .bert. gives no states of its tokens"),
        (other_layers, {}, "takes other layers for short texts than for long ones"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(hook, settings, said, data, hooked):
    hooked(hook)
    with pytest.raises(UserError, match=said):
        set_up(**{"data": data} | settings)


def test_logits_that_are_not_the_plain_modules(data, monkeypatch):
    """Here for want of a mask; a mere rounding passes."""
    with monkeypatch.context() as patch:
        patch.setattr(
            network, "attention_mask", lambda mask, kind, dtype: torch.zeros_like(mask[:, None, None], dtype=dtype)
        )
        with pytest.raises(
            UserError, match=r"^\w+ .\w+. is not read here as transformers reads it .its logits are .* off"
        ):
            set_up(data, method="finetune")
    full = network._full
    monkeypatch.setattr(network, "_full", lambda x: full(x) if x.dtype == torch.float64 else full(x) + 5e-5)
    set_up(data, method="finetune")


def test_a_model_that_does_not_like_padding_is_told_of(data, hooked, capsys):
    hooked(by_width)
    set_up(data, method="finetune")
    assert "gives a text other logits when it is padded" in capsys.readouterr().out
