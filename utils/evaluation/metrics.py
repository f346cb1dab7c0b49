"""What a metric is, PSNR and SSIM, as published: against the uint8 luminance, from the clamped reconstruction in float.

Y is OpenCV's full-range BT.601 luminance; no border is cropped. METRICS in `utils.evaluation` holds all by name.
"""
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SSIM_WINDOW = 7  # scikit-image's default


class Metric:
    """A score of reconstructions.

    A subclass gives `label` and `higher_is_better`, and scores pictures in `__call__` or the set in `of_set`.
    """

    label: str  # in tables
    higher_is_better: bool
    unit = ""
    digits = 4  # after the point, in tables

    def __init__(self, device: "torch.device | str" = "cpu"):
        """Prepare to compute on `device`; raise UserError where what is needed is not installed."""

    def __call__(
        self,
        truth: np.ndarray,  # luminance, uint8 (H, W)
        reconstruction: np.ndarray,  # float32 (H, W) in [0, 255], not rounded; nan where it was not finite
    ) -> float | None:
        """Return the score of one picture; None where only a set of pictures has one."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    def of_set(self, scores: list[float]) -> float:
        """Return the score of the set from those of its pictures, their mean; every process calls it at the end."""
        return float(np.mean(scores))

    def show(self, value: float) -> str:
        """Return "30.12 dB" or "0.9123"."""
        return f"{value:.{self.digits}f}" + (f" {self.unit}" if self.unit else "")


class Psnr(Metric):
    label, unit, digits, higher_is_better = "PSNR", "dB", 2, True

    def __call__(self, truth: np.ndarray, reconstruction: np.ndarray) -> float:
        return psnr(truth, reconstruction)


class Ssim(Metric):
    label, higher_is_better = "SSIM", True

    def __call__(self, truth: np.ndarray, reconstruction: np.ndarray) -> float:
        return ssim(truth, reconstruction)


def psnr(truth: np.ndarray, reconstruction: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB with peak 255: 10 log₁₀(255² / mean squared error).

    Args:
        truth: the luminance, uint8 (H, W).
        reconstruction: float (H, W) in [0, 255], not rounded.

    Returns inf where the two are equal, nan where the reconstruction holds a nan.
    Raises ValueError where the shapes differ.
    """
    _same_shape(truth, reconstruction)
    error = np.mean((truth.astype(np.float64) - reconstruction.astype(np.float64)) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(truth: np.ndarray, reconstruction: np.ndarray) -> float:
    """Structural similarity, scikit-image's with data_range 255 and its 7×7 window.

    Arguments and errors as in `psnr`. Returns nan where either side of the picture is shorter than the window, since
    SSIM is then not defined, and where the reconstruction holds a nan.
    """
    _same_shape(truth, reconstruction)
    if min(truth.shape) < SSIM_WINDOW:
        return math.nan
    from skimage.metrics import structural_similarity  # with scipy, which a mistake in the flags need not wait for

    return float(structural_similarity(truth.astype(np.float64), reconstruction.astype(np.float64),
                                       win_size=SSIM_WINDOW, data_range=255))


def _same_shape(truth: np.ndarray, reconstruction: np.ndarray) -> None:
    if truth.shape != reconstruction.shape:
        raise ValueError(f"a reconstruction of shape {reconstruction.shape} cannot be compared with a truth of "
                         f"shape {truth.shape}")
