"""Scores of a reconstruction, as published: against the uint8 luminance, from the clamped reconstruction in float."""
import math

import numpy as np
from skimage.metrics import structural_similarity

SSIM_WINDOW = 7  # scikit-image's default


def psnr(reference: np.ndarray, reconstruction: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB with peak 255: 10 log₁₀(255² / mean squared error).

    Args:
        reference: the luminance, uint8 (H, W).
        reconstruction: float (H, W) in [0, 255], not rounded.

    Returns inf where the two are equal, nan where the reconstruction holds a nan.
    Raises ValueError where the shapes differ.
    """
    _same_shape(reference, reconstruction)
    error = np.mean((reference.astype(np.float64) - reconstruction.astype(np.float64)) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(reference: np.ndarray, reconstruction: np.ndarray) -> float:
    """Structural similarity, scikit-image's with data_range 255 and its 7×7 window.

    Arguments and errors as in `psnr`. Returns nan where either side of the picture is shorter than the window, since
    SSIM is then not defined, and where the reconstruction holds a nan.
    """
    _same_shape(reference, reconstruction)
    if min(reference.shape) < SSIM_WINDOW:
        return math.nan
    return float(structural_similarity(reference.astype(np.float64), reconstruction.astype(np.float64),
                                       win_size=SSIM_WINDOW, data_range=255))


def _same_shape(reference: np.ndarray, reconstruction: np.ndarray) -> None:
    if reference.shape != reconstruction.shape:
        raise ValueError(f"a reconstruction of shape {reconstruction.shape} cannot be compared with a reference of "
                         f"shape {reference.shape}")
