"""Convolutions of a large picture over strips of its rows in turn: the same numbers, a fraction of the memory.

A 3×3 convolution reads one row beyond a strip, and a group norm reads all rows, so its means and variances are summed
up over the strips first.  Whole features are held of what goes in, and what comes out.
"""
from collections.abc import Callable, Iterator

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = 2**16  # of features, from which on a picture counts as large: one of 512×512 does not, of shuffle 2
PART = 2**14  # tokens of a strip: enough to fill a processor

Rows = Callable[[int, int], Tensor]  # rows a to b of features: (batch, channels, b − a, width)


def worthwhile(x: Tensor) -> bool:
    """Whether features, (batch, channels, h, w), are of a large picture in inference mode.

    Not where gradients are off alone: so are they where the engine computes what it will compute again, to the bit.
    """
    large = x.shape[-2] * x.shape[-1] > TOKENS
    return large and torch.is_inference_mode_enabled() and not torch.compiler.is_compiling()


def resnet(block: ResnetBlock2D, *features: Tensor) -> Tensor:
    """What the block makes of features, concatenated: (batch, channels, h, w), without an embedding of time."""
    def rows(a: int, b: int) -> Tensor:
        parts = [each[:, :, a:b] for each in features]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    height, width = features[0].shape[-2:]
    between = _convolved(block.conv1, _activated(block.norm1, rows, height, width), height, width)
    activated = _activated(block.norm2, lambda a, b: between[:, :, a:b], height, width)
    out = _convolved(block.conv2, activated, height, width, out=between)
    for a, b in _strips(height, width):
        out[:, :, a:b] += rows(a, b) if block.conv_shortcut is None else block.conv_shortcut(rows(a, b))
    return out


def upsample(block: Upsample2D, x: Tensor) -> Tensor:
    """What the block makes of (batch, channels, h, w): (batch, channels, 2h, 2w)."""
    def rows(a: int, b: int) -> Tensor:
        return F.interpolate(x[:, :, a // 2:(b + 1) // 2], scale_factor=2.0)[:, :, a % 2:a % 2 + b - a]

    return _convolved(block.conv, rows, 2 * x.shape[2], 2 * x.shape[3])


def _strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, PART // width)
    for a in range(0, height, step):
        yield a, min(a + step, height)


def _convolved(conv: nn.Conv2d, rows: Rows, height: int, width: int, out: Tensor | None = None) -> Tensor:
    """conv(features), of 3×3 with a border of zeros; `out`: what it may be written into, the features themselves."""
    made = ()
    for a, b in _strips(height, width):
        above, below = min(a, 1), min(height - b, 1)  # rows beyond the strip that there are; of others zeros
        strip = F.pad(rows(a - above, b + below), (0, 0, 1 - above, 1 - below))
        strip = F.conv2d(strip, conv.weight, conv.bias, padding=(0, 1))
        if out is None:
            out = strip.new_empty(*strip.shape[:2], height, width)
        for start, end, before in made:  # not sooner, as this strip has read a row of that one
            out[:, :, start:end] = before
        made = ((a, b, strip),)
    out[:, :, a:b] = strip
    return out


def _activated(norm: nn.GroupNorm, rows: Rows, height: int, width: int) -> Rows:
    """silu(norm(features))."""
    strips = list(_strips(height, width))
    full = torch.promote_types(norm.weight.dtype, torch.float32)
    found = [torch.var_mean(rows(a, b).to(full).unflatten(1, (norm.num_groups, -1)).flatten(2), dim=2, correction=0)
             for a, b in strips]
    variances, means = (torch.stack(each) for each in zip(*found, strict=True))
    share = means.new_tensor([(b - a) / height for a, b in strips]).view(-1, 1, 1)
    mean = (share * means).sum(0)
    deviation = ((share * (variances + (means - mean).square())).sum(0) + norm.eps).sqrt()
    mean, deviation = (each.repeat_interleave(norm.num_channels // norm.num_groups, dim=1)[..., None, None]
                       for each in (mean, deviation))
    scale = norm.weight.view(-1, 1, 1) / deviation
    shift = norm.bias.view(-1, 1, 1) - mean * scale

    def activated(a: int, b: int) -> Tensor:
        strip = rows(a, b)
        return F.silu(torch.addcmul(shift, strip, scale).to(strip.dtype), inplace=True)

    return activated
