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

    For each sampling step t it has two 1×1 convolutions of its own, between features and images folded to their size by
    PixelUnshuffle_r, where the paper has them between unfolded features and images: 1×1 convolutions take pixels in any
    order, and one image is sooner unfolded than all features.

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
        return inputs.folded(self.factor), inputs.operator, inputs.step

    def forward(
        self,
        features: Tensor,  # (batch, channels, H/r, W/r)
        back_projection: Tensor,  # A⁺y, folded: (batch, in_channels · r², H/r, W/r)
        operator: LinearOperator,
        step: int,  # t, from 1 to T
    ) -> Tensor:
        batch, _, height, width = features.shape
        flat = self.factor**2 * height, width  # r² planes of the features' size one below the other
        z = self.lift[step - 1](features.reshape(batch, -1, *flat)).to(back_projection.dtype)
        z = z.reshape(back_projection.shape)  # no view: weights may be channels-last
        image = F.pixel_shuffle(z, self.factor)
        consistent = F.pixel_unshuffle(dagger(operator, operator.A(image)), self.factor)
        images = torch.cat((z, consistent, back_projection), dim=1).reshape(batch, -1, *flat)
        return self.unlift[step - 1](images).reshape(features.shape).add_(features)
