"""Measure the pictures of a test set, reconstruct them and score the results (paper, section 4.1).

What a picture scores depends on the picture, its file's name, the network, the ratio and the seed: not on the others.
"""
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.operators import BlockCompressedSensing, LinearOperator
from utils.devices import memory_suffices
from utils.distributed import Process
from utils.errors import UserError
from utils.images import pad_to_multiple
from utils.metrics import psnr, ssim
from utils.sampling import sampling_matrix
from utils.testsets import Picture

Network = Callable[[Tensor, LinearOperator], Tensor]  # (y, operator) -> x_hat (batch, 1, H, W)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Pixels of a picture at which attention takes as many operations as all else: 45,000 for the compact weights' widths
# and 54,000 for the published ones, by torch.utils.flop_counter and 4 · places² · width for each attention.
ATTENTION_IS_HALF = 50_000


@dataclass(frozen=True, eq=False)
class Result:
    """A reconstruction and its scores."""

    name: str
    psnr: float  # dB; inf where exact, nan where the network's output was not finite
    ssim: float  # nan also for pictures smaller than SSIM's window, 7×7
    seconds: float  # the reconstruction alone, without reading, measuring and scoring
    reconstruction: np.ndarray | None  # luminance, float32 (H, W) in [0, 255], not rounded; nan where not finite


class Scores(NamedTuple):
    """Averages over a test set."""

    psnr: float  # dB
    ssim: float
    seconds: float  # an image
    count: int  # images


def evaluate(
    net: Network,  # any callable (y, operator) -> x_hat; an nn.Module should be in eval mode, on `device`
    pictures: Sequence[Picture],
    cs_ratio: float,  # M / N, in (0, 1]
    block_size: int = 32,  # B; N = B²
    seed: int = 2025,  # of the sampling matrix, and with each picture's file name of its permutation
    device: str | torch.device = "cpu",
    precision: str = "fp32",  # fp32, bf16 or fp16: what autocast computes in
    size_multiple: int = 4,  # the sides the network takes are multiples of it: twice its shuffle factor
    batch_size: int = 1,  # so many pictures of one padded size are reconstructed together
) -> Iterator[Result]:
    """Reconstruct pictures from their measurements, batch after batch, yielding the results as they are there.

    Batches are in the order of their first pictures; with `batch_size` 1 that is the order of the pictures.
    Raises ValueError for an impossible ratio, size or precision, and UserError where memory runs out.
    """
    multiple = _side_multiple(block_size, size_multiple)
    batches = [[pictures[number] for number in batch] for batch in _batches(pictures, multiple, batch_size)]
    return _evaluate(net, batches, cs_ratio, block_size, seed, torch.device(device), precision, multiple)


def evaluate_spread(
    process: Process,  # this one of those that all call this function, with the same pictures and arguments
    net: Network,
    pictures: Sequence[Picture],
    cs_ratio: float,
    block_size: int = 32,
    seed: int = 2025,
    precision: str = "fp32",
    size_multiple: int = 4,
    batch_size: int = 1,
    each: Callable[[Picture, Result], None] | None = None,  # gets every result as it is there, on its own process
) -> list[Result]:
    """`evaluate` on `process.device`, the batches spread over the processes by cost.

    Returns the scores of all pictures in their order, the same list on every process; reconstructions are not in it
    (None), since `each` has had them. Batches do not depend on the number of processes, hence the scores do not.
    Raises what `evaluate` and `each` raise; and where one process fails, so do all, that none waits for it.
    """
    multiple = _side_multiple(block_size, size_multiple)
    _check_same_pictures(process, pictures)
    batches = _batches(pictures, multiple, batch_size)
    costs = [sum(_cost(pictures[number], multiple) for number in batch) for batch in batches]
    mine = [batches[index] for index in spread(costs, process.world_size)[process.rank]]
    stream = _evaluate(net, [[pictures[number] for number in batch] for batch in mine], cs_ratio, block_size, seed,
                       process.device, precision, multiple)
    scores, failure = {}, None
    try:
        for number, result in zip(itertools.chain(*mine), stream, strict=True):
            if each is not None:
                each(pictures[number], result)
            scores[number] = replace(result, reconstruction=None)
    except Exception as error:
        failure = error
    _raise_failures(process, failure)
    everything = {number: result for part in _of_all(process, scores) for number, result in part.items()}
    return [everything[number] for number in range(len(pictures))]


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


def mean_scores(results: Iterable[Result]) -> Scores:
    """Average PSNR, SSIM and seconds; a nan or inf among the results shows in its average.

    Raises ValueError where there are no results.
    """
    scores = np.array([(result.psnr, result.ssim, result.seconds) for result in results], dtype=np.float64)
    if not len(scores):
        raise ValueError("there are no results to average")
    return Scores(*scores.mean(axis=0).tolist(), count=len(scores))


def batch_operator(
    files: list[str],  # the pictures' file names with suffix
    image_shape: tuple[int, int],  # (H, W) after padding
    sampling_matrix: Tensor,  # Φ, (N, M)
    seed: int = 2025,
) -> BlockCompressedSensing:
    """The operator that measures these pictures, each with its own permutation, drawn from seed, file name and size."""
    permutations = torch.stack([_permutation(file, math.prod(image_shape), seed) for file in files])
    return BlockCompressedSensing(sampling_matrix, permutations, tuple(image_shape))


def _permutation(file: str, pixels: int, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{file}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randperm(pixels, generator=generator)


def _evaluate(net: Network, batches: list[list[Picture]], cs_ratio: float, block_size: int, seed: int,
              device: torch.device, precision: str, multiple: int) -> Iterator[Result]:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision}")
    phi = sampling_matrix(cs_ratio, block_size, seed)
    warm = device.type != "cuda"
    for batch in batches:
        with memory_suffices(_purpose(batch, device)):
            x = torch.stack([pad_to_multiple(torch.from_numpy(picture.luminance)[None].float() / 255, multiple)
                             for picture in batch]).to(device)
            operator = batch_operator([picture.file or picture.name for picture in batch], x.shape[-2:], phi, seed)
            operator.to(device)
            y = operator.A(x)
            if not warm:  # the first run on a GPU also loads and chooses kernels
                _reconstruct(net, y, operator, precision)
                warm = True
            start = _clock(device)
            x_hat = _reconstruct(net, y, operator, precision)
            seconds = (_clock(device) - start) / len(batch)
        # Clamping would make a plausible white of an overflow: what is not finite becomes nan, and so does the score.
        x_hat = x_hat[:, 0].float()
        x_hat = torch.where(x_hat.isfinite(), x_hat.clamp(0, 1) * 255, torch.nan).cpu().numpy()
        for picture, padded in zip(batch, x_hat, strict=True):
            height, width = picture.luminance.shape
            found = padded[:height, :width]
            yield Result(picture.name, psnr(picture.luminance, found), ssim(picture.luminance, found), seconds, found)


def _purpose(batch: list[Picture], device: torch.device) -> str:
    """What memory is needed for, and what to do where there is not enough."""
    (height, width), others = batch[0].luminance.shape, len(batch) - 1
    if others:
        return (f"to reconstruct {batch[0].name} ({height}x{width}) and {others} more of its size together on "
                f"{device}: choose a smaller --batch_size")
    return (f"to reconstruct {batch[0].name} ({height}x{width}) on {device}: crop it, or choose another --device or "
            "--precision")


def _batches(pictures: Sequence[Picture], multiple: int, batch_size: int) -> list[list[int]]:
    """Numbers of the pictures to reconstruct together, of one padded size, in the order of the first of each batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    batches, open_batch = [], {}
    for number, picture in enumerate(pictures):
        size = _padded(picture, multiple)
        if size not in open_batch or len(open_batch[size]) == batch_size:
            open_batch[size] = []
            batches.append(open_batch[size])
        open_batch[size].append(number)
    return batches


def _side_multiple(block_size: int, size_multiple: int) -> int:
    """Sides of this multiple suit blocks and network."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    return math.lcm(block_size, size_multiple)


def _padded(picture: Picture, multiple: int) -> tuple[int, int]:
    height, width = picture.luminance.shape
    return height + -height % multiple, width + -width % multiple


def _cost(picture: Picture, multiple: int) -> float:
    """Of a picture's reconstruction, in arbitrary units: attention compares all places with all."""
    pixels = math.prod(_padded(picture, multiple))
    return pixels * (1 + pixels / ATTENTION_IS_HALF)


def _check_same_pictures(process: Process, pictures: Sequence[Picture]) -> None:
    lists = _of_all(process, [(picture.name, picture.luminance.shape) for picture in pictures])
    if any(other != lists[0] for other in lists):
        raise UserError("the processes found different pictures; --data_dir must be one folder that all machines share")


def _raise_failures(process: Process, failure: Exception | None) -> None:
    """Raise this process's failure, else another's: of the user's mistakes the sentence, of others where to look."""
    said = _of_all(process, failure and (isinstance(failure, UserError), str(failure)))
    if failure is not None:
        raise failure
    for rank, (mistake, message) in ((rank, what) for rank, what in enumerate(said) if what):
        raise UserError(message) if mistake else RuntimeError(f"process {rank} failed: {message}")


def _of_all(process: Process, thing: Any) -> list[Any]:
    """`thing` of every process, in order of rank, the same list on all."""
    if process.world_size == 1:
        return [thing]
    things = [None] * process.world_size
    dist.all_gather_object(things, thing)
    return things


@torch.inference_mode()
def _reconstruct(net: Network, y: Tensor, operator: LinearOperator, precision: str) -> Tensor:
    with torch.autocast(y.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        return net(y, operator)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
