"""The distance that a teacher has gone, from sketches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.telemetry.drift import WIDTH, drift, sketch


@given(st.integers(1, 3000), st.floats(1e-6, 10.0), st.integers(0, 99))
@settings(deadline=None)
def test_exact_for_few_weights(n, size, seed):
    torch.manual_seed(seed)
    start, step = torch.randn(n), size * torch.randn(n)
    expected = (start + step - start).norm() / start.norm()
    torch.testing.assert_close(drift(sketch(start), sketch(start + step)), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["everywhere", "alike", "in a part", "in one row"])
def test_close_for_many(kind):
    torch.manual_seed(0)
    n = 40 * WIDTH + 17
    start = torch.randn(n)
    step = 1e-2 * torch.randn(n)
    if kind == "alike":  # every weight by the same: rows must not add up to more, or cancel
        step = torch.full((n,), 1e-2)
    if kind == "in a part":
        step[: n // 2] = 0
    if kind == "in one row":
        step[WIDTH:] = 0
    now = start + step
    expected = (now - start).norm() / start.norm()
    # the norm at the start and that of the difference each have a standard deviation of sqrt(1 / 2 WIDTH) = 0.3 %
    torch.testing.assert_close(drift(sketch(start), sketch(now)), expected, rtol=0.015, atol=0)


def test_no_step_is_no_drift():
    weights = torch.randn(3 * WIDTH)
    assert drift(sketch(weights), sketch(weights.clone())).item() == 0.0
    assert torch.equal(sketch(weights), sketch(weights))


def test_weights_of_low_precision_are_summed_in_float32():
    weights = torch.randn(2 * WIDTH).bfloat16()
    assert torch.equal(sketch(weights), sketch(weights.float()))
