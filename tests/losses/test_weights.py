"""Teacher weights: given ones are what was given, learned ones start equal and stay positive with sum 1."""

import pytest
import torch

from engine.losses.teacher_weights import TeacherWeights

LIKE = torch.zeros(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [[1.0], [0.25, 0.75], (3, 1), [1e-3, 5.0, 200.0]])
def test_given_weights_are_normalised(given, dtype):
    weights = TeacherWeights.of(given, len(given), LIKE.to(dtype))
    got = weights()
    expected = torch.tensor(given, dtype=torch.float64) / sum(given)
    assert got.dtype == dtype and not got.requires_grad and not weights.learned
    assert not list(weights.parameters()) and list(weights.state_dict()) == ["log"]
    torch.testing.assert_close(got.double(), expected, rtol=2e-6 if dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_learned_weights_start_equal(K, dtype):
    weights = TeacherWeights.of("learned", K, LIKE.to(dtype))
    assert weights.learned and [p.shape for p in weights.parameters()] == [(K,)]
    got = weights()
    assert got.requires_grad and got.dtype == dtype
    assert (got - 1 / K).abs().max() < 1e-7 and (got == got[0]).all()


def test_learned_weights_stay_weights():
    """Whatever the optimizer does to their logarithms."""
    weights = TeacherWeights.of("learned", 3, LIKE)
    optimizer = torch.optim.SGD(weights.parameters(), lr=10.0)
    for _ in range(5):
        optimizer.zero_grad()
        (weights() * torch.tensor([1.0, 2.0, -3.0])).sum().backward()
        optimizer.step()
    got = weights()
    assert (got > 0).all() and got[2] == got.max()
    torch.testing.assert_close(got.sum(), torch.tensor(1.0))
    assert TeacherWeights.of(None, 2, LIKE) is None


@pytest.mark.parametrize(
    "given", [[1.0], [1.0, 2.0, 3.0], [], [0.0, 1.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0], "learnt"]
)
def test_what_cannot_be_weights_is_refused(given):
    with pytest.raises(ValueError, match="give 2 positive numbers, one a teacher, or 'learned'"):
        TeacherWeights.of(given, 2, LIKE)
