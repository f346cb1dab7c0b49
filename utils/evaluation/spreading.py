"""Which pictures are reconstructed together, and on which of several processes."""
import math
from collections.abc import Sequence

# Pixels of a picture at which attention takes as many operations as all else: 45,000 for the compact weights' widths
# and 54,000 for the published ones, by torch.utils.flop_counter and 4 · places² · width for each attention.
ATTENTION_IS_HALF = 50_000
BATCH_PIXELS = 2**19  # of a batch on a GPU: eight pictures of 256×256

Size = tuple[int, int]  # (H, W) after padding


def batches(
    sizes: Sequence[Size],
    batch_size: int | None,  # None: one on a CPU, which is no faster with more; on others what BATCH_PIXELS allows
    device_type: str = "cpu",
) -> list[list[int]]:
    """Numbers of the pictures to reconstruct together: of one size, in the order of the first of each batch.

    Raises ValueError for a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    full, filling = [], {}
    for number, size in enumerate(sizes):
        limit = batch_size or (1 if device_type == "cpu" else max(1, BATCH_PIXELS // math.prod(size)))
        if size not in filling or len(filling[size]) == limit:
            filling[size] = []
            full.append(filling[size])
        filling[size].append(number)
    return full


def cost(size: Size) -> float:
    """Of a picture's reconstruction, in arbitrary units: attention compares all places with all."""
    pixels = math.prod(size)
    return pixels * (1 + pixels / ATTENTION_IS_HALF)


def spread(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Which jobs each process does: the costliest first, each to the process with the least to do.

    Returns a list of job numbers, in their order, for each of `world_size` processes; every process finds the same.
    """
    shares, loads = [[] for _ in range(world_size)], [0.0] * world_size
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        least = loads.index(min(loads))
        shares[least].append(job)
        loads[least] += costs[job]
    return [sorted(share) for share in shares]
