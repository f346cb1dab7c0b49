"""Compressed sensing by Walsh-Hadamard coefficients drawn at random, as DDNM's experiments do it."""
import math

import torch
from torch import Tensor

from .base import LinearOperator


class HadamardSensing(LinearOperator):
    """y: some coefficients of the orthonormal Walsh-Hadamard transform of the image, written as one row; A Aᵀ = I.

    The transform is of 2^k numbers, where 2^k is the largest power of two that divides H·W: of the image as one where
    that is a power of two, else of equal pieces of it, one after another.

    Args:
        chosen: which coefficients, int64, (M,), each once.
        image_shape: (H, W).

    Raises:
        ValueError: where a coefficient is chosen twice or does not exist.
    """

    same_for_all = tight = True

    def __init__(self, chosen: Tensor, image_shape: tuple[int, int]):
        super().__init__()
        pixels = math.prod(image_shape)
        once = 0 < len(chosen.unique()) == len(chosen)
        if chosen.ndim != 1 or not once or chosen.min() < 0 or chosen.max() >= pixels:
            raise ValueError(f"coefficients must be chosen from 0 … {pixels - 1}, each once")
        self.image_shape, self.length = tuple(image_shape), pixels & -pixels
        self.register_buffer("chosen", chosen)

    @classmethod
    def random(
        cls,
        image_shape: tuple[int, int],  # (H, W)
        generator: torch.Generator,  # on the CPU
        cs_ratio: float = 0.1,  # M / (H·W), in (0, 1]
    ) -> "HadamardSensing":
        """Draw which coefficients are seen."""
        pixels = math.prod(image_shape)
        if not 0 < cs_ratio <= 1:
            raise ValueError(f"cs_ratio must lie in (0, 1], not {cs_ratio}")
        count = max(1, math.ceil(round(cs_ratio * pixels, 6)))
        return cls(torch.randperm(pixels, generator=generator)[:count], image_shape)

    @classmethod
    def side_multiple(cls) -> int:
        return 32  # pieces of 1024 pixels or more

    def A(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) -> (batch, channels, M)."""
        self.check_image(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._transform(x.float() if x.dtype.itemsize < 4 else x).index_select(-1, self.chosen)

    def A_adjoint(self, y: Tensor) -> Tensor:
        self.check_measurements(y, (y.shape[1], len(self.chosen)))
        with torch.autocast(y.device.type, enabled=False):
            y = y.float() if y.dtype.itemsize < 4 else y
            row = y.new_zeros(*y.shape[:-1], math.prod(self.image_shape)).index_copy(-1, self.chosen, y)
            return self._transform(row).view(*y.shape[:-1], *self.image_shape)

    def _transform(self, x: Tensor) -> Tensor:
        """Of each piece (…, 2^k): sums and differences of halves, k times; it is its own inverse."""
        shape = (*x.shape[:2], -1)
        x = x.reshape(*shape, self.length)
        half = 1
        while half < self.length:
            pairs = x.view(*shape, self.length // (2 * half), 2, half)
            first, second = pairs.unbind(-2)
            x = torch.stack((first + second, first - second), dim=-2).reshape(*shape, self.length)
            half *= 2
        return x.reshape(*shape) / self.length**0.5
