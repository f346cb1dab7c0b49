"""Cartesian MRI: some columns of an image's Fourier transform (of "k-space") are seen, through one coil or several."""
import math

import torch
from torch import Tensor

from .base import LinearOperator
from .least_squares import per_image

FLOOR = 1e-4  # λ of the factor of AᵀA + λI: with less, rounding of Aᵀy in fp32 would come back enlarged
FACTORED = 2**27  # H·W², numbers of the factor, which takes some 6 GB to compute; of more CG is used
MOST_COILS = 256  # twice as many as there are in any scanner


class MRI(LinearOperator):
    """y = M F x of a single coil, F the centred orthonormal Fourier transform, M the columns that are seen.

    Images are real, (batch, 1, H, W), or complex, (batch, 2, H, W) with real and imaginary part.  y is
    (batch, 2, H, W), 0 in the other columns, the lowest frequency in the middle.

    For complex images A Aᵀ is a projection.  For real ones it is none, as a column and its mirror image say the same:
    AᵀA weighs a frequency by ½ where one of the two is seen, and by 1 where both are.

    Args:
        columns: M, (W,), of 0 and 1.
        image_shape: (H, W).
        complex_images: whether images have two channels.

    Raises:
        ValueError: where the columns do not fit the images, or none is seen.
    """

    same_for_all = True

    def __init__(self, columns: Tensor, image_shape: tuple[int, int], complex_images: bool = False):
        super().__init__()
        if columns.shape != (image_shape[1],) or not bool(((columns == 0) | (columns == 1)).all()):
            raise ValueError(f"the columns that are seen must be {image_shape[1]} numbers, 0 or 1, for images of "
                             f"{image_shape[0]}x{image_shape[1]}")
        if not bool(columns.any()):
            raise ValueError("of k-space at least one column must be seen")
        self.image_shape, self.channels = tuple(image_shape), 2 if complex_images else 1
        self.tight = complex_images
        mirrored = columns.float()[(2 * (len(columns) // 2) - torch.arange(len(columns))) % len(columns)]
        self.register_buffer("columns", columns.float())
        self.register_buffer("power", columns.float() if complex_images else (columns.float() + mirrored) / 2)  # of AᵀA

    @classmethod
    def random(
        cls,
        image_shape: tuple[int, int],  # (H, W)
        generator: torch.Generator,  # on the CPU
        acceleration: float = 4.0,  # one column of so many is seen, on average
        center_fraction: float | None = None,  # of the columns, the middle ones, always seen; None: 0.32/acceleration
        complex_images: bool = False,  # two channels
    ) -> "MRI":
        """Draw the columns as fastMRI does: those in the middle, and others at random (0.08 and 0.04 at 4x and 8x)."""
        columns = random_columns(image_shape[1], acceleration, center_fraction, generator)
        return cls(columns, image_shape, complex_images)

    def A(self, x: Tensor) -> Tensor:
        """(batch, 1 or 2, H, W) -> (batch, 2, H, W)."""
        self.check_image(x, self.channels)
        with torch.autocast(x.device.type, enabled=False):
            return _channels(fourier(_complex(x.to(self.columns.dtype))) * self.columns)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self._image(y, self.columns)

    def A_dagger(self, y: Tensor, damping: Tensor | None = None) -> Tensor:
        if self.tight:
            return super().A_dagger(y, damping)
        power = torch.where(self.columns > 0, self.power, 1)
        return self._image(y, self.columns / (power if damping is None else power + per_image(damping, y[:, 0])))

    def measured(self, y: Tensor) -> float:
        return 2 * self.image_shape[0] * float(self.columns.sum())

    def _image(self, y: Tensor, weights: Tensor) -> Tensor:
        self.check_measurements(y, (2, *self.image_shape))
        with torch.autocast(y.device.type, enabled=False):
            return _channels(inverse_fourier(_complex(y.to(self.columns.dtype)) * weights), self.channels)


class MultiCoilMRI(LinearOperator):
    """y = M F (S_c x) of each coil c; S_c is what the coil is sensitive to.

    Images as in `MRI`; y is (batch, 2, coils, H, W).  Since all rows of k-space are seen, the rows of the image can be
    solved for one by one: A⁺ is (AᵀA + 1e-4 I)⁻¹Aᵀ by a Cholesky factor for each row, and A A⁺A differs from A by 5e-3
    at most.  With damping, and for images of H·W² > 2^27, conjugate gradients solve.

    Args:
        sensitivities: S, complex, (coils, H, W); sensibly with Σ |S_c|² = 1.
        columns: M, (W,), of 0 and 1.
        complex_images: whether images have two channels.

    Raises:
        ValueError: where the columns do not fit the sensitivities.
    """

    same_for_all = True

    def __init__(self, sensitivities: Tensor, columns: Tensor, complex_images: bool = False):
        super().__init__()
        if sensitivities.ndim != 3 or not sensitivities.is_complex() or columns.shape != sensitivities.shape[-1:]:
            raise ValueError(f"sensitivities must be complex, (coils, H, W), and the columns (W,), not "
                             f"{tuple(sensitivities.shape)} of {sensitivities.dtype}, and {tuple(columns.shape)}")
        self.image_shape, self.channels = tuple(sensitivities.shape[1:]), 2 if complex_images else 1
        self.register_buffer("sensitivities", torch.view_as_real(sensitivities).float().contiguous())
        self.register_buffer("columns", columns.float())
        height, width = self.image_shape
        factored = height * width**2 <= FACTORED
        self.register_buffer("factor", torch.view_as_real(self._factor(sensitivities, columns)).float().contiguous()
                             if factored else None)

    def _factor(self, sensitivities: Tensor, columns: Tensor) -> Tensor:
        """L, complex, (H, W, W): L Lᴴ = AᵀA + 1e-4 I of each row of the image."""
        eye = torch.eye(len(columns), dtype=torch.complex128)
        transform = fourier(eye[:, None])[:, 0].T  # of one row: its columns are those of unit vectors
        seen = transform.conj().T @ (columns.double()[:, None] * transform)
        s = sensitivities.cdouble()
        gram = torch.einsum("chi,chj->hij", s.conj(), s) * seen
        gram = gram if self.channels == 2 else gram.real.to(gram.dtype)
        return torch.linalg.cholesky(gram + FLOOR * eye)

    @classmethod
    def random(
        cls,
        image_shape: tuple[int, int],  # (H, W)
        generator: torch.Generator,  # on the CPU
        acceleration: float = 4.0,  # as in `MRI`
        center_fraction: float | None = None,
        coils: int = 4,  # around the image; their phases are drawn
        complex_images: bool = False,
    ) -> "MultiCoilMRI":
        """Draw the columns, and then smooth sensitivities with Σ |S_c|² = 1."""
        if coils < 1:
            raise ValueError(f"coils must be at least 1, not {coils}")
        if coils > MOST_COILS:
            raise ValueError(f"coils must be at most {MOST_COILS}, not {coils}")
        columns = random_columns(image_shape[1], acceleration, center_fraction, generator)
        return cls(_sensitivities(image_shape, coils, generator), columns, complex_images)

    def A(self, x: Tensor) -> Tensor:
        """(batch, 1 or 2, H, W) -> (batch, 2, coils, H, W)."""
        self.check_image(x, self.channels)
        with torch.autocast(x.device.type, enabled=False):
            seen = _complex(x.to(self.columns.dtype))[:, None] * torch.view_as_complex(self.sensitivities)
            return _channels(fourier(seen) * self.columns)

    def A_adjoint(self, y: Tensor) -> Tensor:
        self.check_measurements(y, (2, len(self.sensitivities), *self.image_shape))
        with torch.autocast(y.device.type, enabled=False):
            coils = inverse_fourier(_complex(y.to(self.columns.dtype)) * self.columns)
            return _channels((coils * torch.view_as_complex(self.sensitivities).conj()).sum(1), self.channels)

    def A_dagger(self, y: Tensor, damping: Tensor | None = None) -> Tensor:
        if self.factor is None or (damping is not None and damping.any()):
            floor = torch.full((1,), FLOOR, dtype=y.dtype, device=y.device)
            return super().A_dagger(y, floor if damping is None else FLOOR + damping)
        factor = torch.view_as_complex(self.factor)
        with torch.autocast(y.device.type, enabled=False):
            back = _complex(self.A_adjoint(y)).permute(1, 2, 0)  # (H, W, batch)
            x = _channels(torch.cholesky_solve(back, factor).permute(2, 0, 1), self.channels)
        return x if damping is None else x / (1 + per_image(damping, x))  # by 1, but the derivative is kept

    def measured(self, y: Tensor) -> float:
        return 2 * len(self.sensitivities) * self.image_shape[0] * float(self.columns.sum())


def random_columns(count: int, acceleration: float, center_fraction: float | None,
                   generator: torch.Generator) -> Tensor:
    """(count,), 1 for the columns seen: the middle ones, and others to make 1 of `acceleration` on average."""
    if not 1 <= acceleration <= count:
        raise ValueError(f"acceleration must lie between 1 and the {count} columns, not {acceleration}")
    fraction = 0.32 / acceleration if center_fraction is None else center_fraction
    if not 0 <= fraction <= 1:
        raise ValueError(f"center_fraction must lie in [0, 1], not {center_fraction}")
    if center_fraction is not None and center_fraction > 1 / acceleration:
        raise ValueError(f"center_fraction {center_fraction} is more than the {1 / acceleration:.4g} of the columns "
                         f"that acceleration {acceleration} leaves")
    low = max(round(count * fraction), 1)
    probability = (count / acceleration - low) / max(count - low, 1)
    columns = (torch.rand(count, generator=generator, dtype=torch.float64) < probability).float()
    start = (count - low + 1) // 2
    columns[start:start + low] = 1
    return columns


def fourier(x: Tensor) -> Tensor:
    """The centred orthonormal Fourier transform of the last two dimensions."""
    shifted = torch.fft.ifftshift(x, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.fft2(shifted, norm="ortho"), dim=(-2, -1))


def inverse_fourier(k: Tensor) -> Tensor:
    shifted = torch.fft.ifftshift(k, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.ifft2(shifted, norm="ortho"), dim=(-2, -1))


def _complex(x: Tensor) -> Tensor:
    """(batch, 1 or 2, …) -> (batch, …), complex."""
    return torch.complex(x[:, 0], x[:, 1] if x.shape[1] == 2 else torch.zeros_like(x[:, 0]))


def _channels(z: Tensor, channels: int = 2) -> Tensor:
    """(batch, …), complex -> (batch, 1 or 2, …): the real part, and the imaginary one where there is room for it."""
    return torch.stack((z.real, z.imag)[:channels], dim=1)


def _sensitivities(image_shape: tuple[int, int], coils: int, generator: torch.Generator) -> Tensor:
    """Bells around points on a circle about the image, each with a phase that is linear along a direction drawn."""
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, side, dtype=torch.float64) for side in image_shape),
                                   indexing="ij")
    found = []
    for coil in range(coils):
        angle = 2 * math.pi * coil / coils
        distance = (rows - 1.2 * math.sin(angle)) ** 2 + (columns - 1.2 * math.cos(angle)) ** 2
        phase, slope_down, slope_right = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1) * math.pi
        found.append(torch.polar(torch.exp(-distance / 2), phase + slope_down * rows / 2 + slope_right * columns / 2))
    bells = torch.stack(found)
    return (bells / bells.abs().square().sum(0).sqrt()).to(torch.complex64)
