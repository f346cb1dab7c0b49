"""One decomposition serves all ratios, and nobody can tell."""
import pytest
import torch

from model.operators import random_sampling_matrix
from utils import sampling
from utils.errors import UserError


@pytest.mark.parametrize("block_size", [1, 10])  # 0.07 * 100 is 7.000000000000001
def test_matrices_are_those_drawn_for_each_ratio(block_size):
    for ratio in (0.07, 0.1, 0.104, 0.3, 1e-9, 1.0):
        expected = random_sampling_matrix(ratio, block_size, torch.Generator().manual_seed(5))
        assert sampling.sampling_matrix(ratio, block_size, 5).equal(expected)
    assert not sampling.sampling_matrix(1.0, 10, 6).equal(sampling.sampling_matrix(1.0, 10, 5))


def test_blocks_too_large_for_the_memory_are_said_in_a_sentence(monkeypatch):
    def exhausted(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 34359738368 bytes.")
    monkeypatch.setattr(sampling, "random_sampling_matrix", exhausted)
    with pytest.raises(UserError, match="not enough memory for blocks of 256x256: choose a smaller --block_size"):
        sampling.sampling_matrix(0.1, 256, 0)
