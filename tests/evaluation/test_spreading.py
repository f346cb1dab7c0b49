"""Batches and shares against what they are by definition."""
import numpy as np
import pytest

from utils.evaluation.spreading import BATCH_PIXELS, batches, cost, spread


def test_batches_hold_one_size_in_the_order_of_their_first_pictures():
    a, b = (64, 64), (64, 96)
    assert batches([a, b, a, a, b], 2) == [[0, 2], [1, 4], [3]]
    assert batches([a, b, a], 1) == batches([a, b, a], None, "cpu") == [[0], [1], [2]]
    assert batches([], 4) == []
    with pytest.raises(ValueError, match="at least 1, not 0"):
        batches([a], 0)


def test_a_gpu_takes_as_many_as_make_half_a_million_pixels():
    sizes = [(256, 256)] * 17 + [(512, 512)] * 3 + [(2048, 2048)] * 2
    found = batches(sizes, None, "cuda")
    assert [len(batch) for batch in found] == [8, 8, 1, 2, 1, 1, 1]
    assert BATCH_PIXELS == 8 * 256**2


def test_cost_grows_as_attention_does():
    """At 50,000 pixels half of it is attention, which goes with the square."""
    assert cost((200, 250)) == 2 * 50_000
    assert cost((400, 500)) == (4 + 16) * 50_000


def test_the_costliest_jobs_are_spread_first():
    assert spread([2, 9, 4, 3, 3], 2) == [[0, 1], [2, 3, 4]]
    assert spread([5, 5, 5], 1) == [[0, 1, 2]]
    assert spread([1.0], 3) == [[0], [], []]
    rng = np.random.default_rng(0)
    for world_size in (2, 3, 8):
        costs = rng.uniform(1, 50, 100)
        shares = spread(costs, world_size)
        assert sorted(sum(shares, [])) == list(range(100))
        loads = [costs[share].sum() for share in shares]
        assert max(loads) - min(loads) <= costs.max()  # greedy: the last job went to the least loaded
        assert max(loads) <= (4 / 3) * max(costs.sum() / world_size, costs.max())  # Graham's bound, longest first
