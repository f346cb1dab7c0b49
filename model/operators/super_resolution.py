"""Super-resolution: only a smaller version of the image is seen."""
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import LinearOperator
from .least_squares import inverse_gain


class SuperResolution(LinearOperator):
    """y = R x Cᵀ: the rows and the columns of an image are made fewer, each by a matrix.

    A⁺ and its damped form are closed ones, by the singular values of R and C.

    Args:
        rows: R, (h, H).
        columns: C, (w, W).
    """

    same_for_all = True

    def __init__(self, rows: Tensor, columns: Tensor):
        super().__init__()
        self.image_shape = rows.shape[1], columns.shape[1]
        self.small_shape = len(rows), len(columns)
        for name, matrix in (("rows", rows), ("columns", columns)):
            u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
            for part, tensor in (("", matrix), ("_u", u), ("_s", s), ("_vt", vt)):
                self.register_buffer(name + part, tensor.float().contiguous())
        self.renew()

    def renew(self) -> None:
        self.tight = bool(((torch.cat((self.rows_s, self.columns_s)) - 1).abs() < 1e-5).all())

    @classmethod
    def random(
        cls,
        image_shape: tuple[int, int],  # (H, W)
        generator: torch.Generator | None = None,  # nothing is drawn
        factor: int = 2,  # s: (H, W) becomes (⌈H/s⌉, ⌈W/s⌉)
        kernel: Literal["mean", "bicubic"] = "mean",  # s times the mean of s×s pixels, or bicubic with antialiasing
    ) -> "SuperResolution":
        """Means are scaled so that A Aᵀ = I: y / s is a picture.  Where s divides no side, the last cells are cut."""
        if factor < 1:
            raise ValueError(f"factor must be at least 1, not {factor}")
        if kernel not in ("mean", "bicubic"):
            raise ValueError(f"kernel must be one of mean, bicubic, not {kernel}")
        make = _means if kernel == "mean" else _bicubic
        return cls(*(make(side, min(factor, side)) for side in image_shape))

    @classmethod
    def stacked(cls, operators: Sequence["SuperResolution"]) -> "SuperResolution":
        return operators[0]

    def A(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) -> (batch, channels, h, w)."""
        self.check_image(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.rows @ x.to(self.rows.dtype) @ self.columns.T

    def A_adjoint(self, y: Tensor) -> Tensor:
        self.check_measurements(y, (y.shape[1], *self.small_shape))
        with torch.autocast(y.device.type, enabled=False):
            return self.rows.T @ y.to(self.rows.dtype) @ self.columns

    def A_dagger(self, y: Tensor, damping: Tensor | None = None) -> Tensor:
        if self.tight:
            return super().A_dagger(y, damping)
        self.check_measurements(y, (y.shape[1], *self.small_shape))
        with torch.autocast(y.device.type, enabled=False):
            s = self.rows_s[:, None] * self.columns_s
            coefficients = self.rows_u.T @ y.to(s.dtype) @ self.columns_u
            return self.rows_vt.T @ (coefficients * inverse_gain(s, damping, y)) @ self.columns_vt


def _means(side: int, factor: int) -> Tensor:
    """⌈side/factor⌉ rows, each 1/√n at the n pixels of its cell."""
    cell = torch.arange(side) // factor
    matrix = (torch.arange(math.ceil(side / factor))[:, None] == cell).float()
    return matrix / matrix.sum(1, keepdim=True).sqrt()


def _bicubic(side: int, factor: int) -> Tensor:
    eye = torch.eye(side, dtype=torch.float64)[None, None]
    size = math.ceil(side / factor)
    return F.interpolate(eye, size=(size, side), mode="bicubic", antialias=True, align_corners=False)[0, 0].float()
