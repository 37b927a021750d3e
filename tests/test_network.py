"""A network's inputs and a learner's schedule."""

import pytest
import torch

from engine.embedded import build
from engine.learner import Learner
from engine.network import Encoder, attention_mask

TEXTS = ["the plot was superb", "the soup is awful and the rice was late", "a camera"]


@pytest.mark.parametrize("alias", ["bert", "roberta", "distilbert"])
def test_a_ready_mask_gives_the_same_logits(alias):
    """What is passed on a GPU instead of the 2-D mask."""
    module, tokenizer = build(alias, TEXTS, 2, 0)
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False))
    assert not inputs["attention_mask"].all()
    module.config._attn_implementation = "sdpa"
    with torch.no_grad():
        plain = module(**inputs).logits
        ready = module(**inputs | {"attention_mask": attention_mask(inputs["attention_mask"])}).logits
    torch.testing.assert_close(ready, plain, rtol=1e-5, atol=1e-6)


def test_schedule_rises_from_above_zero_and_falls_to_zero():
    module, _ = build("tinybert", TEXTS, 2, 0)
    learner = Learner.adamw(
        Encoder("t", module, "e"), lr=1.0, steps=20, warmup_ratio=0.25, weight_decay=0.01, max_grad_norm=1.0
    )
    rates = []
    for _ in range(20):
        rates.append(learner.schedule.get_last_lr()[0])
        learner.update()
    assert rates[0] > 0 and rates.index(max(rates)) == 5 and max(rates) == 1.0
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] > 0
    assert learner.schedule.get_last_lr()[0] == 0.0


def test_decay_is_for_matrices_alone():
    module, _ = build("bert", TEXTS, 2, 0)
    learner = Learner.adamw(
        Encoder("t", module, "e"), lr=1.0, steps=2, warmup_ratio=0.0, weight_decay=0.1, max_grad_norm=1.0
    )
    decay = {id(p): group["weight_decay"] for group in learner.optimizer.param_groups for p in group["params"]}
    for name, p in module.named_parameters():
        assert decay[id(p)] == (0.0 if "LayerNorm" in name or name.endswith("bias") else 0.1), name
