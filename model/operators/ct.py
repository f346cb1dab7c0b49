"""Sparse-view computed tomography: parallel projections of the image from a few directions (its Radon transform)."""
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .base import LinearOperator
from .least_squares import per_image

if TYPE_CHECKING:
    import scipy.sparse

FLOOR = 1e-6  # λ of the factor of A Aᵀ + λI
FACTORED = 12_000  # rays: of so many A Aᵀ is factored, which takes memory of their square; of more CG is used
MOST_ANGLES, MOST_WEIGHTS = 10_000, 2**28  # angles, and angles times pixels: the matrix then takes some 25 GB


class CT(LinearOperator):
    """y = s R x: sums along rays, R with the geometry of `skimage.transform.radon(x, angles, circle=False)`.

    The angles are spread evenly over 180 degrees.  s = 1/√(angles · longer side), so that |A| is about 1.

    Views of one image nearly depend on each other, so that A Aᵀ is singular but for rounding.  A⁺ is computed as
    Aᵀ(A Aᵀ + 1e-6 I)⁻¹, for A A⁺A to differ from A by 5e-4 at most; a Cholesky factor of it is kept for up to 12,000
    rays (angles times the image's diagonal).

    Args:
        image_shape: (H, W).
        angles: how many.

    Raises:
        ValueError: for less than one angle, or so many that the matrix would take more than some 25 GB.
    """

    same_for_all = True
    max_iterations = 200

    def __init__(self, image_shape: tuple[int, int], angles: int):
        super().__init__()
        if angles < 1:
            raise ValueError(f"angles must be at least 1, not {angles}")
        if angles > MOST_ANGLES or angles * math.prod(image_shape) > MOST_WEIGHTS:
            raise ValueError(f"the matrix of {angles} angles and {image_shape[0]}x{image_shape[1]} pixels would be too "
                             "large; take fewer angles or smaller images")
        _silence_beta()
        self.image_shape, self.angles = tuple(image_shape), angles
        matrix = radon_matrix(self.image_shape, angles)
        self.detectors = matrix.shape[0] // angles
        for name, each in (("", matrix), ("_transposed", matrix.T.tocsr())):
            # Three plain tensors, since modules do not move sparse ones from device to device in every release.
            self.register_buffer("rows" + name, torch.from_numpy(each.indptr.astype(np.int64)))
            self.register_buffer("columns" + name, torch.from_numpy(each.indices.astype(np.int64)))
            self.register_buffer("values" + name, torch.from_numpy(each.data.astype(np.float32)))
        self.register_buffer("factor", _factor(self.image_shape, angles) if matrix.shape[0] <= FACTORED else None)

    @classmethod
    def random(
        cls,
        image_shape: tuple[int, int],  # (H, W)
        generator: torch.Generator | None = None,  # nothing is drawn
        angles: int = 30,  # views, evenly over 180 degrees
    ) -> "CT":
        """Build the matrix; for 128×128 pixels and 30 views it takes seconds, once a process."""
        return cls(image_shape, angles)

    @classmethod
    def stacked(cls, operators: Sequence["CT"]) -> "CT":
        return operators[0]

    def A(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) -> (batch, channels, angles, detectors)."""
        self.check_image(x)
        return self._product(x, transposed=False).unflatten(-1, (self.angles, self.detectors))

    def A_adjoint(self, y: Tensor) -> Tensor:
        self.check_measurements(y, (y.shape[1], self.angles, self.detectors))
        return self._product(y, transposed=True).unflatten(-1, self.image_shape)

    def A_dagger(self, y: Tensor, damping: Tensor | None = None) -> Tensor:
        if self.factor is None or (damping is not None and damping.any()):
            floor = torch.full((1,), FLOOR, dtype=y.dtype, device=y.device)
            return super().A_dagger(y, floor if damping is None else FLOOR + damping)
        self.check_measurements(y, (y.shape[1], self.angles, self.detectors))
        with torch.autocast(y.device.type, enabled=False):
            columns = y.to(self.factor.dtype).flatten(2).flatten(0, 1).T  # (rays, batch · channels)
            solved = torch.cholesky_solve(columns, self.factor).T.reshape(y.shape)
        x = self.A_adjoint(solved)
        return x if damping is None else x / (1 + per_image(damping, x))  # by 1, but the derivative is kept

    def _product(self, x: Tensor, transposed: bool) -> Tensor:
        """(batch, channels, …) -> (batch, channels, rays), or pixels."""
        own, other = ("_transposed", "") if transposed else ("", "_transposed")
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(self.values.dtype).flatten(2)
            return _SparseProduct.apply(flat.flatten(0, 1), *self._sparse(own), *self._sparse(other)).unflatten(
                0, flat.shape[:2])

    def _sparse(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(getattr(self, part + name) for part in ("rows", "columns", "values"))


class _SparseProduct(torch.autograd.Function):
    """x Mᵀ of a sparse M (m, n) and x (batch, n), given M and Mᵀ as their rows, columns and values."""

    @staticmethod
    def forward(x: Tensor, *both: Tensor) -> Tensor:
        rows, columns, values, rows_transposed = both[:4]
        size = len(rows) - 1, len(rows_transposed) - 1
        with torch.sparse.check_sparse_tensor_invariants(False):
            return (torch.sparse_csr_tensor(rows, columns, values, size) @ x.T.contiguous()).T.contiguous()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad: Tensor):
        both = ctx.saved_tensors
        return _SparseProduct.apply(grad, *both[3:], *both[:3]), *[None] * 6


@lru_cache(maxsize=1)
def _silence_beta() -> None:
    """Let PyTorch say once, unheard, that its sparse CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


@lru_cache(maxsize=2)
def radon_matrix(image_shape: tuple[int, int], angles: int) -> "scipy.sparse.csr_matrix":
    """s R, (angles · detectors, H·W), float64: turn the image about its middle, bilinearly, and sum its columns."""
    from scipy.sparse import vstack  # slow to import, and only CT needs it

    side, before = zip(*(_padded(length, max(image_shape)) for length in image_shape), strict=True)
    center, views = side[0] // 2, []
    rows, columns = np.mgrid[:side[0], :side[0]] - center
    for angle in np.pi * np.arange(angles) / angles:
        x = np.cos(angle) * columns + np.sin(angle) * rows + center - before[1]
        y = np.cos(angle) * rows - np.sin(angle) * columns + center - before[0]
        views.append(_bilinear(x, y, columns + center, (side[0], *image_shape)))
    return (vstack(views) / math.sqrt(angles * max(image_shape))).tocsr()


def _padded(length: int, longest: int) -> tuple[int, int]:
    """(side, before): to what a side is padded so that the image's diagonal fits in, and by how much on its left."""
    extra = math.ceil(math.sqrt(2) * longest - length)
    return length + extra, (length + extra) // 2 - length // 2


def _bilinear(x: np.ndarray, y: np.ndarray, detector: np.ndarray,
              shape: tuple[int, int, int]) -> "scipy.sparse.coo_matrix":
    """Add to a detector the image at (x, y), for all three arrays' elements; shape is (detectors, H, W)."""
    from scipy.sparse import coo_matrix

    detectors, height, width = shape
    parts = []
    for row in (np.floor(y), np.floor(y) + 1):
        for column in (np.floor(x), np.floor(x) + 1):
            weight = (1 - np.abs(y - row)) * (1 - np.abs(x - column))
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (weight > 0)
            pixel = row[inside].astype(np.int64) * width + column[inside].astype(np.int64)
            parts.append((weight[inside], detector[inside], pixel))
    weights, rows, pixels = (np.concatenate(each) for each in zip(*parts, strict=True))
    return coo_matrix((weights, (rows, pixels)), shape=(detectors, height * width))


@lru_cache(maxsize=2)
def _factor(image_shape: tuple[int, int], angles: int) -> Tensor:
    """L, lower triangular, float32: L Lᵀ = A Aᵀ + 1e-6 I."""
    matrix = radon_matrix(image_shape, angles)
    gram = torch.from_numpy((matrix @ matrix.T).toarray())
    gram.diagonal().add_(FLOOR)
    return torch.linalg.cholesky(gram).float()
