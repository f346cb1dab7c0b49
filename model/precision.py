"""What stays in full precision where autocast computes in half, or where a network is cast to it."""
from collections.abc import Callable

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


class FullPrecisionModule(nn.Module):
    """A module whose parameters are moved with its network, and not cast to half precision with it.

    A noise schedule is one: bf16 rounds an α of 0.998 to 1, which alone costs the compact weights 0.3 dB.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FullPrecisionModule":
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype in (torch.float16, torch.bfloat16) else result

        return super()._apply(moved, recurse)
