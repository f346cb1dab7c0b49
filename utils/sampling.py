"""Sampling matrices of several ratios from one singular value decomposition."""
from functools import lru_cache

import torch
from torch import Tensor

from model.operators import number_of_measurements, random_sampling_matrix
from utils.devices import memory_suffices


def sampling_matrix(cs_ratio: float, block_size: int, seed: int) -> Tensor:
    """Φ (N, M), the very numbers of `random_sampling_matrix` with a generator of that seed.

    Raises ValueError for a ratio outside (0, 1] or a block size below 1, and UserError where memory runs out.
    """
    columns = number_of_measurements(cs_ratio, block_size)
    with memory_suffices(f"for blocks of {block_size}x{block_size}: choose a smaller --block_size"):
        return _square(block_size, seed)[:, :columns].contiguous()


@lru_cache(maxsize=2)
def _square(block_size: int, seed: int) -> Tensor:
    """Φ of ratio 1, which begins with those of all others; a second of work at the published N = 1024."""
    return random_sampling_matrix(1.0, block_size, torch.Generator().manual_seed(seed))
