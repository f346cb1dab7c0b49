"""A matrix of the user's own, for the whole image or for its blocks."""
import math
from pathlib import Path

import torch
from torch import Tensor

from .base import LinearOperator
from .cs import permuted
from .files import read_matrix
from .least_squares import inverse_gain


class MatrixSensing(LinearOperator):
    """y = Φ b of each block b of B×B pixels, or of the image as one; A⁺ is a closed form, by Φ's singular values.

    Args:
        matrix: Φ, (M, N), N = B² or N = H·W; one with more rows than columns is taken as Φᵀ.
        image_shape: (H, W), multiples of B.
        permutation: π, int64, (H·W,), of all pixels before they are cut into blocks; None: blocks of neighbours.

    Raises:
        ValueError: where the matrix does not fit the images.
    """

    same_for_all = True

    def __init__(self, matrix: Tensor, image_shape: tuple[int, int], permutation: Tensor | None = None):
        super().__init__()
        if matrix.ndim != 2 or not matrix.numel():
            raise ValueError(f"a matrix must be (M, N), not {tuple(matrix.shape)}")
        matrix = matrix.T if len(matrix) > matrix.shape[1] else matrix
        pixels, side = math.prod(image_shape), block_side(matrix.shape[1])
        self.block = tuple(image_shape) if matrix.shape[1] == pixels else (side, side)
        if side == 0 and matrix.shape[1] != pixels or any(a % b for a, b in zip(image_shape, self.block, strict=True)):
            of_blocks = f"or be a multiple of {side} a side" if side else "which are not to be cut into square blocks"
            raise ValueError(f"a matrix for {matrix.shape[1]} pixels does not fit images of {image_shape[0]}x"
                             f"{image_shape[1]}: they must have so many pixels, {of_blocks}")
        self.image_shape = tuple(image_shape)
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        for name, tensor in (("matrix", matrix), ("u", u), ("s", s), ("vt", vt)):
            self.register_buffer(name, tensor.float().contiguous())
        self.register_buffer("permutation", permutation)
        self.register_buffer("inverse_permutation", None if permutation is None else permutation.argsort())
        self.renew()

    def renew(self) -> None:
        self.tight = bool(((self.s - 1).abs() < 1e-4).all())

    @classmethod
    def random(
        cls,
        image_shape: tuple[int, int],  # (H, W)
        generator: torch.Generator,  # on the CPU
        matrix: Path,  # a .npy file
        permuted: bool = False,  # whether all pixels are shuffled before they are cut into blocks, as in `cs`
    ) -> "MatrixSensing":
        """Read the matrix, and draw the permutation where there is one."""
        permutation = torch.randperm(math.prod(image_shape), generator=generator) if permuted else None
        return cls(read_matrix(matrix, "matrix"), image_shape, permutation)

    @classmethod
    def side_multiple(cls, matrix: Path) -> int:
        return block_side(max(read_matrix(matrix, "matrix").shape)) or 1

    def A(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) -> (batch, channels, blocks, M)."""
        self.check_image(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._cut(x.to(self.matrix.dtype)) @ self.matrix.T

    def A_adjoint(self, y: Tensor) -> Tensor:
        self._check(y)
        with torch.autocast(y.device.type, enabled=False):
            return self._joined(y.to(self.matrix.dtype) @ self.matrix)

    def A_dagger(self, y: Tensor, damping: Tensor | None = None) -> Tensor:
        if self.tight:
            return super().A_dagger(y, damping)
        self._check(y)
        with torch.autocast(y.device.type, enabled=False):
            return self._joined((y.to(self.s.dtype) @ self.u) * inverse_gain(self.s, damping, y) @ self.vt)

    def _check(self, y: Tensor) -> None:
        blocks = math.prod(self.image_shape) // self.matrix.shape[1]
        self.check_measurements(y, (y.shape[1], blocks, len(self.matrix)))

    def _cut(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) -> (batch, channels, blocks, N)."""
        if self.permutation is not None:
            pixels = permuted(x.flatten(2), self.permutation, self.inverse_permutation)
            return pixels.unflatten(-1, (-1, self.matrix.shape[1]))
        (height, width), (rows, columns) = self.image_shape, self.block
        x = x.reshape(*x.shape[:2], height // rows, rows, width // columns, columns)
        return x.transpose(3, 4).flatten(2, 3).flatten(3)

    def _joined(self, blocks: Tensor) -> Tensor:
        (height, width), (rows, columns) = self.image_shape, self.block
        if self.permutation is not None:
            pixels = permuted(blocks.flatten(2), self.inverse_permutation, self.permutation)
            return pixels.unflatten(-1, (height, width))
        x = blocks.reshape(*blocks.shape[:2], height // rows, width // columns, rows, columns)
        return x.transpose(3, 4).reshape(*blocks.shape[:2], height, width)


def block_side(pixels: int) -> int:
    """B, where B² are so many pixels; 0 where no whole number is."""
    side = math.isqrt(pixels)
    return side if side**2 == pixels else 0
