"""Measure the pictures of a test set, reconstruct them and score the results (paper, section 4.1).

What a picture scores depends on the picture, its name, the network, the ratio and the seed: not on the other pictures.
"""
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.operators import BlockCompressedSensing, LinearOperator, random_sampling_matrix
from utils.errors import UserError
from utils.images import pad_to_multiple
from utils.metrics import psnr, ssim
from utils.testsets import Picture

Network = Callable[[Tensor, LinearOperator], Tensor]  # (y, operator) -> x_hat (batch, 1, H, W)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Result:
    """A reconstruction and its scores."""

    name: str
    psnr: float  # dB; inf where exact, nan where the network's output was not finite
    ssim: float  # nan also for pictures smaller than SSIM's window, 7×7
    seconds: float  # the reconstruction alone, without reading, measuring and scoring
    reconstruction: np.ndarray  # luminance, float32 (H, W) in [0, 255], not rounded; nan where not finite


class Scores(NamedTuple):
    """Averages over a test set."""

    psnr: float  # dB
    ssim: float
    seconds: float  # an image
    count: int  # images


def evaluate(
    net: Network,  # any callable (y, operator) -> x_hat; an nn.Module should be in eval mode, on `device`
    pictures: Iterable[Picture],
    cs_ratio: float,  # M / N, in (0, 1]
    block_size: int = 32,  # B; N = B²
    seed: int = 2025,  # of the sampling matrix, and with each picture's name of its permutation
    device: str | torch.device = "cpu",
    precision: str = "fp32",  # fp32, bf16 or fp16: what autocast computes in
    size_multiple: int = 4,  # the sides the network takes are multiples of it: twice its shuffle factor
) -> Iterator[Result]:
    """Reconstruct one picture after another from its measurements, yielding each result as it is there.

    Raises ValueError for an impossible ratio, block size or precision, and UserError where memory runs out.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision}")
    device = torch.device(device)
    with _memory_suffices(f"for blocks of {block_size}x{block_size}: choose a smaller --block_size"):
        sampling_matrix = _sampling_matrix(cs_ratio, block_size, seed)
    multiple = math.lcm(block_size, size_multiple)
    warm = device.type != "cuda"
    for picture in pictures:
        height, width = picture.luminance.shape
        with _memory_suffices(f"to reconstruct {picture.name} ({height}x{width}) on {device}: crop it, or choose "
                              "another --device or --precision"):
            x = pad_to_multiple(torch.from_numpy(picture.luminance)[None, None].float() / 255, multiple).to(device)
            operator = picture_operator(picture.name, x.shape[-2:], sampling_matrix, seed).to(device)
            y = operator.A(x)
            if not warm:  # the first run on a GPU also loads and chooses kernels
                _reconstruct(net, y, operator, precision)
                warm = True
            start = _clock(device)
            x_hat = _reconstruct(net, y, operator, precision)
            seconds = _clock(device) - start
        x_hat = x_hat[0, 0, :height, :width].float()
        # Clamping would make a plausible white of an overflow: what is not finite becomes nan, and so does the score.
        x_hat = torch.where(x_hat.isfinite(), x_hat.clamp(0, 1) * 255, torch.nan).cpu().numpy()
        yield Result(picture.name, psnr(picture.luminance, x_hat), ssim(picture.luminance, x_hat), seconds, x_hat)


def mean_scores(results: Iterable[Result]) -> Scores:
    """Average PSNR, SSIM and seconds; a nan or inf among the results shows in its average.

    Raises ValueError where there are no results.
    """
    scores = np.array([(result.psnr, result.ssim, result.seconds) for result in results], dtype=np.float64)
    if not len(scores):
        raise ValueError("there are no results to average")
    return Scores(*scores.mean(axis=0).tolist(), count=len(scores))


def picture_operator(
    name: str,
    image_shape: tuple[int, int],  # (H, W) after padding
    sampling_matrix: Tensor,  # Φ, (N, M)
    seed: int = 2025,
) -> BlockCompressedSensing:
    """The operator that measures the picture `name`: its permutation is drawn from the seed, the name and the size."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    permutation = torch.randperm(image_shape[0] * image_shape[1], generator=generator)
    return BlockCompressedSensing(sampling_matrix, permutation, tuple(image_shape))


@lru_cache(maxsize=4)  # an SVD of N×N numbers: a second at the published N = 1024
def _sampling_matrix(cs_ratio: float, block_size: int, seed: int) -> Tensor:
    return random_sampling_matrix(cs_ratio, block_size, torch.Generator().manual_seed(seed))


@torch.inference_mode()
def _reconstruct(net: Network, y: Tensor, operator: LinearOperator, precision: str) -> Tensor:
    with torch.autocast(y.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        return net(y, operator)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _memory_suffices(purpose: str) -> Iterator[None]:
    """Turn running out of memory, on whatever device, into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch gives a GPU's exhaustion a class of its own, but the CPU's is told by its message alone.
        exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if exhausted or any(words in str(error) for words in ("allocate memory", "not enough memory", "overflowed")):
            raise UserError(f"there is not enough memory {purpose}") from error
        raise
