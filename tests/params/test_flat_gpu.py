"""Flat parameters on a GPU. Imports little, so that it runs on a machine with few packages."""

import pytest
import torch

from engine.params.vectors import Rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sums_on_a_gpu_are_the_same_every_time():
    rows, values = torch.randint(50, (20_000,)).cuda(), torch.randn(20_000, 64).cuda()
    first = Rows.summed(rows, values)
    for _ in range(20):
        assert torch.equal(Rows.summed(rows, values).values, first.values)
