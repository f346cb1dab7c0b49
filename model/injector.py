"""Injectors: bring the measurement y and the operator A into the U-Net's features (paper, section 3.3)."""
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .operators import LinearOperator, dagger
from .precision import FullPrecisionConv2d

if TYPE_CHECKING:
    from .unet import Inputs


class Injector(nn.Module):
    """features + unlift([z, A⁺A z, A⁺y]), where z = lift(features) is an image.

    For each sampling step t it has two 1×1 convolutions of its own.

    Args:
        channels: nf, width of the features; a multiple of factor².
        factor: r, side of the image by side of the features.
        num_steps: T.
        in_channels: of the images.
    """

    def __init__(self, channels: int, factor: int, num_steps: int, in_channels: int = 1):
        super().__init__()
        if channels % factor**2:
            raise ValueError(f"an injector of width {channels} cannot unfold {factor}x{factor} pixels: "
                             f"the width must be a multiple of {factor**2}")
        self.factor = factor
        folded = channels // factor**2
        seen = 3 * in_channels
        self.lift = nn.ModuleList(FullPrecisionConv2d(folded, in_channels, kernel_size=1) for _ in range(num_steps))
        self.unlift = nn.ModuleList(FullPrecisionConv2d(seen, folded, kernel_size=1) for _ in range(num_steps))

    def reads(self, inputs: "Inputs") -> tuple[Tensor, LinearOperator, int]:
        return inputs.back_projection, inputs.operator, inputs.step

    def forward(
        self,
        features: Tensor,  # (batch, channels, H/r, W/r)
        back_projection: Tensor,  # A⁺y, (batch, in_channels, H, W)
        operator: LinearOperator,
        step: int,  # t, from 1 to T
    ) -> Tensor:
        z = self.lift[step - 1](F.pixel_shuffle(features, self.factor)).to(back_projection.dtype)
        image = torch.cat((z, dagger(operator, operator.A(z)), back_projection), dim=1)
        return features + F.pixel_unshuffle(self.unlift[step - 1](image), self.factor)
