"""Measure the pictures of a test set, reconstruct them and score the results (paper, section 4.1).

What a picture scores depends on the picture, its file's name, the network, the ratio and the seed: not on the others.
"""
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.operators import BlockCompressedSensing, LinearOperator
from utils.devices import memory_suffices
from utils.images import pad_to_multiple
from utils.metrics import psnr, ssim
from utils.sampling import sampling_matrix
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
    seed: int = 2025,  # of the sampling matrix, and with each picture's file name of its permutation
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
    phi = sampling_matrix(cs_ratio, block_size, seed)
    multiple = math.lcm(block_size, size_multiple)
    warm = device.type != "cuda"
    for picture in pictures:
        height, width = picture.luminance.shape
        with memory_suffices(f"to reconstruct {picture.name} ({height}x{width}) on {device}: crop it, or choose "
                             "another --device or --precision"):
            x = pad_to_multiple(torch.from_numpy(picture.luminance)[None, None].float() / 255, multiple).to(device)
            operator = picture_operator(picture.file or picture.name, x.shape[-2:], phi, seed).to(device)
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
    file: str,  # the picture's file name with suffix
    image_shape: tuple[int, int],  # (H, W) after padding
    sampling_matrix: Tensor,  # Φ, (N, M)
    seed: int = 2025,
) -> BlockCompressedSensing:
    """The operator that measures a picture: its permutation is drawn from the seed, the file name and the size."""
    digest = hashlib.sha256(f"{seed}:{file}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    permutation = torch.randperm(image_shape[0] * image_shape[1], generator=generator)
    return BlockCompressedSensing(sampling_matrix, permutation, tuple(image_shape))


@torch.inference_mode()
def _reconstruct(net: Network, y: Tensor, operator: LinearOperator, precision: str) -> Tensor:
    with torch.autocast(y.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        return net(y, operator)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
