"""What stays in full precision where autocast computes in half."""
import torch
from torch import Tensor, nn


class FullPrecisionConv2d(nn.Conv2d):
    """A convolution in the precision of its weights, under autocast too.

    It is for the maps between features and the few channels of an image: conv_in, conv_out and the injectors'.  All
    numbers of the image pass through them, so what is rounded there is lost for good, and they are 0.04 % of the
    arithmetic at 256×256 and full width (`arithmetic_shares` in benchmarks/half_precision.py).
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))
