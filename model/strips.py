"""A residual block over strips of a large picture's rows in turn: the same numbers, a fraction of the memory.

A 3×3 convolution reads one row beyond a strip, and a group norm reads all rows, so its means and variances are summed
up over the strips first.  Whole features are held of what goes in, what comes out, and once between.
"""
from collections.abc import Callable, Iterator

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = 2**18  # of a picture's features, from which on memory counts for more than a few copies of rows
PART = 2**14  # tokens of a strip: enough to fill a processor

Rows = Callable[[int, int], Tensor]  # rows a to b of features: (batch, channels, b − a, width)


def worthwhile(x: Tensor) -> bool:
    """Whether features, (batch, channels, h, w), are of a large picture, and nothing is differentiated or compiled."""
    large = x.shape[-2] * x.shape[-1] > TOKENS
    return large and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def resnet(block: ResnetBlock2D, *features: Tensor) -> Tensor:
    """What the block makes of features, concatenated: (batch, channels, h, w), without an embedding of time."""
    def rows(a: int, b: int) -> Tensor:
        parts = [each[:, :, a:b] for each in features]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    height, width = features[0].shape[-2:]
    between = _convolved(block.norm1, block.conv1, rows, height, width)
    out = _convolved(block.norm2, block.conv2, lambda a, b: between[:, :, a:b], height, width)
    for a, b in _strips(height, width):
        out[:, :, a:b] += rows(a, b) if block.conv_shortcut is None else block.conv_shortcut(rows(a, b))
    return out


def _strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, PART // width)
    for a in range(0, height, step):
        yield a, min(a + step, height)


def _convolved(norm: nn.GroupNorm, conv: nn.Conv2d, rows: Rows, height: int, width: int) -> Tensor:
    """conv(silu(norm(features)))."""
    scale, shift = _affine(norm, rows, height, width)
    out = None
    for a, b in _strips(height, width):
        above, below = min(a, 1), min(height - b, 1)  # rows beyond the strip that there are; of others zeros
        strip = rows(a - above, b + below)
        strip = F.silu(torch.addcmul(shift, strip, scale).to(strip.dtype), inplace=True)
        strip = F.conv2d(F.pad(strip, (0, 0, 1 - above, 1 - below)), conv.weight, conv.bias, padding=(0, 1))
        if out is None:
            out = strip.new_empty(*strip.shape[:2], height, width)
        out[:, :, a:b] = strip
    return out


def _affine(norm: nn.GroupNorm, rows: Rows, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Factors and summands of each image's channels, (batch, channels, 1, 1), that a group norm comes to."""
    strips = list(_strips(height, width))
    found = [torch.var_mean(rows(a, b).float().unflatten(1, (norm.num_groups, -1)).flatten(2), dim=2, correction=0)
             for a, b in strips]
    variances, means = map(torch.stack, zip(*found, strict=True))
    share = torch.tensor([(b - a) / height for a, b in strips], device=means.device).view(-1, 1, 1)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    mean, deviation = (each.repeat_interleave(norm.num_channels // norm.num_groups, dim=1)[..., None, None]
                       for each in (mean, (variance + norm.eps).sqrt()))
    scale = norm.weight.view(-1, 1, 1) / deviation
    return scale, norm.bias.view(-1, 1, 1) - mean * scale
