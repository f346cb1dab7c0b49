"""Photographs in 8 bits: measure one, recover it, and give it its colours back (paper, section 4.1)."""
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from .operators import BlockCompressedSensing

if TYPE_CHECKING:
    from .idm import IDM


def luminance(
    image: np.ndarray,  # uint8, (H, W) or RGB (H, W, 3)
) -> np.ndarray:
    """Return Y of OpenCV's YCrCb, which is BT.601 over the full range: uint8 (H, W); raises ValueError for another."""
    if not isinstance(image, np.ndarray):  # as None, which cv2.imread returns of a missing file
        raise ValueError(f"an image must be a numpy array, uint8 and (H, W) or (H, W, 3), not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or image.size == 0:
        raise ValueError(f"an image must be uint8 and (H, W) or (H, W, 3), not {image.dtype} and {image.shape}")
    if image.ndim == 2:
        return image
    weights = np.array([4899, 9617, 1868], np.uint32)  # 0.299, 0.587 and 0.114 in units of 2⁻¹⁴
    return ((image @ weights + 2**13) >> 14).astype(np.uint8)


def with_luminance(
    image: np.ndarray,  # uint8, (H, W) or RGB (H, W, 3)
    y: np.ndarray,  # float (H, W), in [0, 255]
) -> np.ndarray:
    """Return the image with another luminance and its own Cr and Cb, uint8; what is not a number becomes black.

    A change of Y alone is the same change of R, G and B.
    """
    y = np.nan_to_num(y, nan=0.0)
    if image.ndim == 3:
        y = image + (y - luminance(image))[..., None]
    return y.round().clip(0, 255).astype(np.uint8)


@torch.inference_mode()
def reconstruct(net: "IDM", image: np.ndarray, cs_ratio: float, block_size: int, seed: int) -> np.ndarray:
    """See `IDM.reconstruct`."""
    truth = np.ascontiguousarray(luminance(image))  # which a picture turned upside down is not
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    height, width = truth.shape
    x = torch.from_numpy(truth).to(net.device)[None, None] / 255
    x = F.pad(x, (0, -width % block_size, 0, -height % block_size))
    operator = BlockCompressedSensing.random(x.shape[-2:], cs_ratio, block_size, torch.Generator().manual_seed(seed))
    operator.to(net.device)
    x_hat = net(operator.A(x), operator)[0, 0, :height, :width].float()
    return with_luminance(image, x_hat.clamp(0, 1).mul(255).cpu().numpy())
