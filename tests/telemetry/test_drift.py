"""The distance that a teacher has gone, from sketches."""

import pytest
import torch

from engine.telemetry.drift import WIDTH, drift, sketch


@pytest.mark.parametrize(("n", "size"), [(1, 1.0), (3000, 1e-6), (WIDTH, 10.0)])
def test_exact_for_few_weights(n, size):
    torch.manual_seed(n)
    start, step = torch.randn(n), size * torch.randn(n)
    expected = (start + step - start).norm() / start.norm()
    torch.testing.assert_close(drift(sketch(start), sketch(start + step)), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["everywhere", "alike", "in one row"])
def test_close_for_many(kind):
    torch.manual_seed(0)
    n = 12 * WIDTH + 17
    start, step = torch.randn(n), 1e-2 * torch.randn(n)
    if kind == "alike":  # every weight by the same: rows must not add up to more, or cancel
        step = torch.full((n,), 1e-2)
    if kind == "in one row":
        step[WIDTH:] = 0
    now = start + step
    expected = (now - start).norm() / start.norm()
    # the norm at the start and that of the difference each have a standard deviation of sqrt(1 / 2 WIDTH) = 0.3 %
    torch.testing.assert_close(drift(sketch(start), sketch(now)), expected, rtol=0.015, atol=0)


def test_the_same_weights_have_the_same_sketch_in_float32():
    weights = torch.randn(2 * WIDTH).bfloat16()
    assert torch.equal(sketch(weights), sketch(weights.float()))
    assert drift(sketch(weights), sketch(weights.clone())).item() == 0.0
