"""Deblurring: the image is seen through a blur, by circular convolution (Gaussian, motion, or a kernel of a file)."""
import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .base import LinearOperator
from .files import read_matrix
from .least_squares import inverse_gain


class Deblurring(LinearOperator):
    """y = k ∗ x, the image continued periodically; A⁺ is a closed form in the Fourier domain.

    Frequencies that the blur leaves less than √eps of (3e-4 in fp32) count as unseen, or rounding would come back
    enlarged.

    Args:
        kernel: k, (rows, columns), both odd; its middle is where a pixel stays.
        image_shape: (H, W), no smaller than the kernel.

    Raises:
        ValueError: for a kernel of an even side, larger than the images, or all 0.
    """

    same_for_all = True

    def __init__(self, kernel: Tensor, image_shape: tuple[int, int]):
        super().__init__()
        if kernel.ndim != 2 or any(side % 2 == 0 for side in kernel.shape):
            raise ValueError(f"a blur kernel must have odd sides, or it has no middle; this is "
                             f"{'x'.join(map(str, kernel.shape))}")
        if any(side > room for side, room in zip(kernel.shape, image_shape, strict=True)):
            raise ValueError(f"a blur kernel of {kernel.shape[0]}x{kernel.shape[1]} is larger than the images, "
                             f"{image_shape[0]}x{image_shape[1]}")
        if not kernel.isfinite().all() or not kernel.any():
            raise ValueError("a blur kernel must hold finite numbers that are not all 0")
        self.image_shape = tuple(image_shape)
        rows, columns = kernel.shape
        point_spread = torch.zeros(image_shape, dtype=torch.float64)
        point_spread[:rows, :columns] = kernel.double()
        point_spread = point_spread.roll((-(rows // 2), -(columns // 2)), (0, 1))
        transfer = torch.view_as_real(torch.fft.rfft2(point_spread))  # as two real numbers, which `.to` does not lose
        self.register_buffer("transfer", transfer.float().contiguous())

    @classmethod
    def random(
        cls,
        image_shape: tuple[int, int],  # (H, W)
        generator: torch.Generator,  # on the CPU
        kind: Literal["gaussian", "motion"] = "gaussian",  # motion: along a line, whose angle is drawn
        side: int = 9,  # of the kernel; odd
        sigma: float = 1.6,  # of the Gaussian, in pixels
        kernel: Path | None = None,  # a .npy file in place of all these; it is scaled to a sum of 1
    ) -> "Deblurring":
        """Draw a blur."""
        if kernel is not None:
            return cls(_read_kernel(kernel), image_shape)
        if side < 1 or side % 2 == 0:
            raise ValueError(f"side must be odd and at least 1, or the kernel has no middle, not {side}")
        if side > min(image_shape):
            raise ValueError(f"a blur kernel of {side}x{side} is larger than the images, "
                             f"{image_shape[0]}x{image_shape[1]}")
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be above 0, not {sigma}")
        if kind not in ("gaussian", "motion"):
            raise ValueError(f"kind must be one of gaussian, motion, not {kind}")
        drawn = _gaussian(side, sigma) if kind == "gaussian" else _motion(side, generator)
        return cls(drawn, image_shape)

    def A(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) -> the same."""
        return self._filtered(x, self.transfer)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self._filtered(y, self._adjoint)

    def A_dagger(self, y: Tensor, damping: Tensor | None = None) -> Tensor:
        strength = torch.view_as_complex(self.transfer).abs()
        direction = self._adjoint / strength.clamp(min=torch.finfo(strength.dtype).tiny)[..., None]
        return self._filtered(y, direction, inverse_gain(strength, damping, y)[..., None])

    @property
    def _adjoint(self) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(self.transfer).conj_physical())

    def _filtered(self, x: Tensor, transfer: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Multiply frequencies by `transfer`, complex as two numbers, and then by `gain`.

        The gain is real and by itself: products of real numbers are the same to the bit whether it is one for all
        images or one for each, which PyTorch's of complex numbers are not.
        """
        self.check_image(x)
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfft2(x.to(self.transfer.dtype)) * torch.view_as_complex(transfer)
            spectrum = torch.view_as_complex(torch.view_as_real(spectrum) * gain)
            return torch.fft.irfft2(spectrum, s=self.image_shape)


def _gaussian(side: int, sigma: float) -> Tensor:
    line = torch.exp(-((torch.arange(side, dtype=torch.float64) - side // 2) / sigma) ** 2 / 2)
    return line.outer(line) / line.sum() ** 2


def _motion(side: int, generator: torch.Generator) -> Tensor:
    """A line through the middle, as long as the kernel, at an angle that is drawn; each of its points spread over the
    four pixels around it."""
    angle = math.pi * float(torch.rand((), generator=generator, dtype=torch.float64))
    radius, kernel = side // 2, torch.zeros(side + 1, side + 1, dtype=torch.float64)
    t = torch.linspace(-radius, radius, 8 * side + 1, dtype=torch.float64)
    rows, columns = (radius + t * direction for direction in (math.sin(angle), math.cos(angle)))
    for below in (0, 1):
        for right in (0, 1):
            share = (1 - (rows - rows.floor() - below).abs()) * (1 - (columns - columns.floor() - right).abs())
            at = (rows.floor().long() + below).clamp(max=side), (columns.floor().long() + right).clamp(max=side)
            kernel.index_put_(at, share, accumulate=True)
    return kernel[:side, :side] / kernel[:side, :side].sum()


def _read_kernel(path: Path) -> Tensor:
    kernel = read_matrix(path, "kernel")
    if kernel.sum().abs() < 1e-12:
        raise ValueError(f"the kernel {path} has the sum {float(kernel.sum())}, and cannot be scaled to 1")
    return kernel / kernel.sum()
