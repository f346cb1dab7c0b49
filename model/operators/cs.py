"""Block-based compressed sensing of a permuted image, the published operator (paper, section 3.1)."""
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.utils.parametrizations import _Orthogonal
from torch.nn.utils.parametrize import is_parametrized

from .base import LinearOperator


class BlockCompressedSensing(LinearOperator):
    """The published operator: shuffle all pixels by π, cut into rows of N, multiply each row by Φ.

    A x = (π x) Φ and Aᵀ y = π⁻¹ (y Φᵀ), with ΦᵀΦ = I, hence A Aᵀ = I.  Where Φ's columns are not orthonormal, or it is
    learned and `torch.nn.utils.parametrizations.orthogonal` does not keep them so, conjugate gradients compute A⁺.

    Args:
        sampling_matrix: Φ, (N, M) with N = block_size²; an nn.Parameter is kept as one.
        permutation: π, int64; pixel `permutation[i]` of the flattened image goes to place i. (H·W,) serves images in
            batches of any size; (batch, H·W) measures each image of such a batch with its own.
        image_shape: (H, W), with H·W a multiple of N.

    Raises:
        ValueError: where the shapes do not fit each other, or the permutation is none.
    """

    def __init__(self, sampling_matrix: Tensor, permutation: Tensor, image_shape: tuple[int, int]):
        super().__init__()
        height, width = image_shape
        if sampling_matrix.ndim != 2 or not 1 <= sampling_matrix.shape[1] <= len(sampling_matrix):
            raise ValueError(f"the sampling matrix must be (N, M) with 1 <= M <= N, not {tuple(sampling_matrix.shape)}")
        pixels, n = height * width, len(sampling_matrix)
        if min(height, width) < 1 or pixels % n:
            raise ValueError(f"a {height}x{width} image cannot be cut into rows of {n} pixels; pad it first")
        if permutation.dtype != torch.int64 or permutation.ndim not in (1, 2) or permutation.shape[-1] != pixels:
            raise ValueError(f"the permutation must be ({pixels},) or (batch, {pixels}) and int64, "
                             f"not {tuple(permutation.shape)} and {permutation.dtype}")
        self.image_shape, self.same_for_all = (height, width), permutation.ndim == 1
        if isinstance(sampling_matrix, nn.Parameter):
            self.sampling_matrix = sampling_matrix
        else:
            self.register_buffer("sampling_matrix", sampling_matrix)
        sorted_permutation, inverse = permutation.sort(-1)
        # On another device one would wait for it; check_operator notices there too.
        if permutation.device.type == "cpu" and not is_fake(permutation):
            wrong = int((sorted_permutation != torch.arange(pixels)).sum())
            if wrong:
                raise ValueError(f"the permutation must have each of 0, …, {pixels - 1} once; {wrong} are amiss")
        self.register_buffer("permutation", permutation)
        self.register_buffer("inverse_permutation", inverse)
        self.renew()

    def renew(self) -> None:
        self._orthonormal: bool | None = None  # not measured yet

    @classmethod
    def random(
        cls,
        image_shape: tuple[int, int],  # (H, W)
        cs_ratio: float,  # M / N, in (0, 1]
        block_size: int,  # B; N = B²
        generator: torch.Generator,  # a CPU generator: the same seed gives the same operator on every device
        sampling_matrix: Tensor | None = None,  # Φ of `shared`, of which the first M columns are used
    ) -> "BlockCompressedSensing":
        """Draw Φ, unless it is given, then π; on the device of Φ, or on the CPU."""
        columns = number_of_measurements(cs_ratio, block_size)
        if sampling_matrix is None:
            sampling_matrix = random_sampling_matrix(cs_ratio, block_size, generator)
        permutation = torch.randperm(image_shape[0] * image_shape[1], generator=generator)
        if sampling_matrix.device.type == "cuda":
            permutation = permutation.pin_memory()  # else the copy would wait for the device
        permutation = permutation.to(sampling_matrix.device, non_blocking=True)
        operator = cls(sampling_matrix[:, :columns].contiguous(), permutation, image_shape)
        operator._orthonormal = True
        return operator

    @classmethod
    def shared(cls, generator: torch.Generator, block_size: int) -> dict[str, Tensor]:
        """Return Φ of ratio 1, which begins with that of every other ratio; a second of work at N = 1024."""
        return {"sampling_matrix": random_sampling_matrix(1.0, block_size, generator)}

    @classmethod
    def side_multiple(cls, block_size: int) -> int:
        number_of_measurements(1.0, block_size)  # which refuses impossible ones
        return block_size

    @classmethod
    def stacked(cls, operators: "Sequence[BlockCompressedSensing]") -> "BlockCompressedSensing":
        permutations = torch.stack([operator.permutation for operator in operators])
        stacked = cls(operators[0].sampling_matrix, permutations, operators[0].image_shape)
        stacked._orthonormal = operators[0]._orthonormal
        return stacked

    @property
    def tight(self) -> bool:
        """Whether ΦᵀΦ = I, as far as that is sure."""
        if is_parametrized(self, "sampling_matrix"):
            return any(isinstance(each, _Orthogonal) for each in self.parametrizations.sampling_matrix)
        phi = self.sampling_matrix
        if phi.requires_grad:
            return False
        if is_fake(phi):  # it has no numbers; memory is counted with such
            return True
        if self._orthonormal is None:
            gram = phi.detach().double().T @ phi.detach().double()
            off = (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()
            self._orthonormal = bool(off <= 1e-4 + 4 * torch.finfo(phi.dtype).eps)
        return self._orthonormal

    def A(self, x: Tensor) -> Tensor:
        """(batch, 1, H, W) -> (batch, H·W/N, M), in the precision of Φ, under autocast too."""
        if x.shape[1:] != (1, *self.image_shape):
            raise ValueError(f"the operator measures (batch, 1, {self.image_shape[0]}, {self.image_shape[1]}) images, "
                             f"not {tuple(x.shape)}")
        self._check_batch(x)
        n, _ = self.sampling_matrix.shape
        with torch.autocast(x.device.type, enabled=False):
            pixels = _Permute.apply(x.to(self.sampling_matrix.dtype).flatten(1), self.permutation,
                                    self.inverse_permutation)
            return pixels.view(len(x), pixels.shape[-1] // n, n) @ self.sampling_matrix

    def A_adjoint(self, y: Tensor) -> Tensor:
        """(batch, H·W/N, M) -> (batch, 1, H, W), in the precision of Φ, under autocast too."""
        height, width = self.image_shape
        n, m = self.sampling_matrix.shape
        if y.shape[1:] != (height * width // n, m):
            raise ValueError(f"the operator's measurements are (batch, {height * width // n}, {m}), "
                             f"not {tuple(y.shape)}")
        self._check_batch(y)
        with torch.autocast(y.device.type, enabled=False):
            pixels = (y.to(self.sampling_matrix.dtype) @ self.sampling_matrix.T).flatten(1)
            pixels = _Permute.apply(pixels, self.inverse_permutation, self.permutation)
            return pixels.view(len(y), 1, height, width)

    def _check_batch(self, x: Tensor) -> None:
        if self.permutation.ndim == 2 and len(x) != len(self.permutation):
            raise ValueError(f"the operator has permutations for {len(self.permutation)} images, not {len(x)}")


def random_sampling_matrix(cs_ratio: float, block_size: int, generator: torch.Generator) -> Tensor:
    """Φ: the first M = ceil(cs_ratio · N) columns of U Vᵀ, where U S Vᵀ is an N×N Gaussian matrix and N = block_size².

    Of one generator state, the matrix of a lower ratio is the beginning of that of a higher one.
    Returns (N, M) float32 on the CPU; raises ValueError for a ratio outside (0, 1], a block size below 1, and a
    generator of another device, whose numbers would be others.
    """
    if generator.device.type != "cpu":
        raise ValueError(f"the generator must be a CPU generator, not one of {generator.device}")
    columns = number_of_measurements(cs_ratio, block_size)
    n = block_size**2
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(gaussian)
    return (u @ vt)[:, :columns].float().contiguous()


def number_of_measurements(cs_ratio: float, block_size: int) -> int:
    """M = ceil(cs_ratio · N), N = block_size²; raises ValueError for a ratio outside (0, 1] or a block size below 1."""
    if not 0 < cs_ratio <= 1:
        raise ValueError(f"cs_ratio must lie in (0, 1], not {cs_ratio}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    return max(1, math.ceil(round(cs_ratio * block_size**2, 6)))  # rounded first: 0.07 * 100 is 7.000000000000001


def permuted(
    x: Tensor,  # (..., pixels)
    permutation: Tensor,  # (pixels,), or of x (batch, pixels) for each row
    inverse: Tensor,  # its inverse permutation
) -> Tensor:
    """Return x gathered along its last dimension, pixel permutation[i] at i; backward gathers by the inverse."""
    return _Permute.apply(x, permutation, inverse)


class _Permute(torch.autograd.Function):
    """Gather along the last dimension by a permutation; its gradient is the gather by the inverse (no scatter).

    A permutation (pixels,) serves all rows of x (batch, pixels); of (batch, pixels) each row has its own.
    """

    generate_vmap_rule = True  # torch.func's transforms, by which other libraries differentiate operators

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def forward(x: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(-1, permutation) if permutation.ndim == 1 else x.gather(-1, permutation)

    @staticmethod
    def backward(ctx, grad: Tensor):
        permutation, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, permutation), None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_: None) -> Tensor:
        return _Permute.apply(tangent, *ctx.saved_tensors)
