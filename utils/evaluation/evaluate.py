"""Measure the pictures of a test set, reconstruct them and score the results (paper, section 4.1).

What a picture scores depends on the picture, its file's name, the network, the ratio and the seed: not on the others.
"""
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model.operators import BlockCompressedSensing, LinearOperator
from utils.data.images import pad_to_multiple
from utils.data.testsets import Picture
from utils.devices import PRECISIONS, computing_in, memory_suffices
from utils.distributed import Process
from utils.errors import UserError
from utils.evaluation.metrics import psnr, ssim
from utils.evaluation.spreading import batches, cost, spread
from utils.sampling import sampling_matrix

Network = Callable[[Tensor, LinearOperator], Tensor]  # (y, operator) -> x_hat (batch, 1, H, W)
Metric = Callable[[np.ndarray, np.ndarray], float]  # (uint8 luminance, float reconstruction in [0, 255]) -> score
NO_METRICS: Mapping[str, Metric] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Result:
    """A reconstruction and its scores."""

    name: str
    psnr: float  # dB; inf where exact, nan where the network's output was not finite
    ssim: float  # nan also for pictures smaller than SSIM's window, 7×7
    seconds: float  # the reconstruction alone, without reading, measuring and scoring
    reconstruction: np.ndarray | None  # luminance, float32 (H, W) in [0, 255], not rounded; nan where not finite
    others: dict[str, float] = field(default_factory=dict)  # what further metrics say, by name


class Scores(NamedTuple):
    """Averages over a test set."""

    psnr: float  # dB
    ssim: float
    seconds: float  # an image
    count: int  # images
    others: dict[str, float] = {}  # of further metrics, by name


def evaluate(
    net: Network,  # any callable (y, operator) -> x_hat; an nn.Module should be in eval mode, on `device`
    pictures: Sequence[Picture],
    cs_ratio: float,  # M / N, in (0, 1]
    block_size: int = 32,  # B; N = B²
    seed: int = 2025,  # of the sampling matrix, and with each picture's file name of its permutation
    device: str | torch.device = "cpu",
    precision: str = "fp32",  # fp32, bf16 or fp16: what autocast computes in
    size_multiple: int = 4,  # the sides the network takes are multiples of it: twice its shuffle factor
    batch_size: int | None = 1,  # so many pictures of one padded size together; None: what suits the device
    metrics: Mapping[str, Metric] = NO_METRICS,  # further ones, called with luminance and reconstruction
) -> Iterator[Result]:
    """Reconstruct pictures from their measurements, batch after batch, yielding the results as they are there.

    Batches are in the order of their first pictures; with `batch_size` 1 that is the order of the pictures.
    Raises ValueError for an impossible ratio, size or precision, and UserError where memory runs out.
    """
    device, multiple = torch.device(device), _side_multiple(block_size, size_multiple)
    jobs = batches(_sizes(pictures, multiple), batch_size, device.type)
    return _evaluate(net, [[pictures[number] for number in job] for job in jobs], cs_ratio, block_size, seed, device,
                     precision, multiple, metrics)


def evaluate_spread(
    process: Process,  # this one of those that all call this function, with the same pictures and arguments
    net: Network,
    pictures: Sequence[Picture],
    cs_ratio: float,
    block_size: int = 32,
    seed: int = 2025,
    precision: str = "fp32",
    size_multiple: int = 4,
    batch_size: int | None = 1,
    metrics: Mapping[str, Metric] = NO_METRICS,
    each: Callable[[Picture, Result], None] | None = None,  # gets every result as it is there, on its own process
) -> list[Result]:
    """`evaluate` on `process.device`, the batches spread over the processes by cost.

    Returns the scores of all pictures in their order, the same list on every process; reconstructions are not in it
    (None), since `each` has had them. Batches do not depend on the number of processes, hence the scores do not, as
    long as each has as many threads.
    Raises what `evaluate` and `each` raise; and where one process fails, so do all, that none waits for it.
    """
    _check_same_pictures(process, pictures)
    multiple = _side_multiple(block_size, size_multiple)
    sizes = _sizes(pictures, multiple)
    jobs = batches(sizes, batch_size, process.device.type)
    costs = [sum(cost(sizes[number]) for number in job) for job in jobs]
    mine = [jobs[number] for number in spread(costs, process.world_size)[process.rank]]
    stream = _evaluate(net, [[pictures[number] for number in job] for job in mine], cs_ratio, block_size, seed,
                       process.device, precision, multiple, metrics)
    scores, failure = {}, None
    try:
        for number, result in zip(itertools.chain(*mine), stream, strict=True):
            if each is not None:
                each(pictures[number], result)
            scores[number] = replace(result, reconstruction=None)
    except Exception as error:
        failure = error
    _raise_failures(process, failure)
    everything = {number: result for part in process.all_gather(scores) for number, result in part.items()}
    return [everything[number] for number in range(len(pictures))]


def first_batch(pictures: Sequence[Picture], block_size: int, size_multiple: int, batch_size: int | None,
                device: torch.device) -> list[Picture]:
    """The pictures that `evaluate` reconstructs first."""
    sizes = _sizes(pictures, _side_multiple(block_size, size_multiple))
    return [pictures[number] for number in batches(sizes, batch_size, device.type)[0]]


def mean_scores(results: Iterable[Result]) -> Scores:
    """Average PSNR, SSIM and seconds; a nan or inf among the results shows in its average.

    Raises ValueError where there are no results.
    """
    results = list(results)
    if not results:
        raise ValueError("there are no results to average")
    rows = [(result.psnr, result.ssim, result.seconds, *result.others.values()) for result in results]
    psnr, ssim, seconds, *others = np.mean(rows, axis=0, dtype=np.float64).tolist()
    return Scores(psnr, ssim, seconds, len(results), dict(zip(results[0].others, others, strict=True)))


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


def _side_multiple(block_size: int, size_multiple: int) -> int:
    """Of this the padded sides are multiples, so that blocks and network take them."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    return math.lcm(block_size, size_multiple)


def _sizes(pictures: Sequence[Picture], multiple: int) -> list[tuple[int, int]]:
    """(H, W) of each picture after padding."""
    shapes = [picture.luminance.shape for picture in pictures]
    return [(height + -height % multiple, width + -width % multiple) for height, width in shapes]


def _evaluate(net: Network, jobs: list[list[Picture]], cs_ratio: float, block_size: int, seed: int,
              device: torch.device, precision: str, multiple: int, metrics: Mapping[str, Metric]) -> Iterator[Result]:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision}")
    phi, compiled = sampling_matrix(cs_ratio, block_size, seed), _is_compiled(net)
    tried = set()
    for batch in jobs:
        with memory_suffices(_purpose(batch, device)):
            x = torch.stack([pad_to_multiple(torch.from_numpy(picture.luminance)[None].float() / 255, multiple)
                             for picture in batch]).to(device)
            operator = batch_operator([picture.file or picture.name for picture in batch], x.shape[-2:], phi, seed)
            operator.to(device)
            y = operator.A(x)
            # The first time on a GPU also loads and chooses kernels; the first time of each size also compiles.
            first = x.shape if compiled else ()
            if (compiled or device.type == "cuda") and first not in tried:
                _reconstruct(net, y, operator, precision)
                tried.add(first)
            start = _clock(device)
            x_hat = _reconstruct(net, y, operator, precision)
            seconds = (_clock(device) - start) / len(batch)
        # Clamping would make a plausible white of an overflow: what is not finite becomes nan, and so does the score.
        x_hat = x_hat[:, 0].float()
        x_hat = torch.where(x_hat.isfinite(), x_hat.clamp(0, 1) * 255, torch.nan).cpu().numpy()
        for picture, found in zip(batch, x_hat, strict=True):
            truth = picture.luminance
            found = found[:truth.shape[0], :truth.shape[1]]
            yield Result(picture.name, psnr(truth, found), ssim(truth, found), seconds, found,
                         {name: metric(truth, found) for name, metric in metrics.items()})


def _is_compiled(net: Network) -> bool:
    """Whether torch.compile has taken a part of it."""
    return isinstance(net, nn.Module) and any(module._compiled_call_impl for module in net.modules())


def _purpose(batch: list[Picture], device: torch.device) -> str:
    """What memory is needed for, and what to do where there is not enough."""
    (height, width), others = batch[0].luminance.shape, len(batch) - 1
    if others:
        return (f"to reconstruct {batch[0].name} ({height}x{width}) and {others} more of its size together on "
                f"{device}: choose a smaller --batch_size")
    return (f"to reconstruct {batch[0].name} ({height}x{width}) on {device}: crop it, or choose another --device or "
            "--precision")


def _check_same_pictures(process: Process, pictures: Sequence[Picture]) -> None:
    lists = process.all_gather([(picture.name, picture.luminance.shape) for picture in pictures])
    if any(other != lists[0] for other in lists):
        raise UserError("the processes found different pictures; --data_dir must be one folder that all machines share")


def _raise_failures(process: Process, failure: Exception | None) -> None:
    """Raise this process's failure, else another's: of the user's mistakes the sentence, of others where to look."""
    said = process.all_gather(failure and (isinstance(failure, UserError), str(failure)))
    if failure is not None:
        raise failure
    for rank, (mistake, message) in ((rank, what) for rank, what in enumerate(said) if what):
        raise UserError(message) if mistake else RuntimeError(f"process {rank} failed: {message}")


@torch.inference_mode()
def _reconstruct(net: Network, y: Tensor, operator: LinearOperator, precision: str) -> Tensor:
    with computing_in(precision, y.device):
        return net(y, operator)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
