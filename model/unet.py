"""Level two: Stable Diffusion's U-Net, cut down, its blocks written as reversible chains (paper, section 3.2).

Left of UNet2DConditionModel are two down blocks and two up blocks, without time embedding, mid block, cross-attention.
Around every attention stand two injectors.  Inside a block the features are a pair of streams (x, s·x), which chains of
couplings carry through and m merges again as x₁ + m·x₂.  The building blocks are diffusers' own modules.
"""
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import Transformer2DModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .couplings import WeightedCoupling
from .feed_forward import PartwiseFeedForward
from .injector import Injector
from .operators import LinearOperator
from .precision import FullPrecisionConv2d
from .reversible import ReversibleChain, holding

PAIRS_DOWN, PAIRS_UP = 2, 3  # (resnet, attention) pairs in a down block and in an up block
PLACES_AT_ONCE = 2**14  # of the features, differentiated at once: enough to fill a GPU

Injection = tuple[Tensor, LinearOperator, int]  # back-projection Aᵀy, operator, step t: what every injector reads


class Resnet(nn.Module):
    """Residual convolutions, on the features with a skip concatenated behind them where there is one."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.block = ResnetBlock2D(in_channels=in_channels, out_channels=out_channels, temb_channels=None,
                                   groups=norm_groups, eps=1e-5, non_linearity="silu")

    def forward(self, x: Tensor, *skip: Tensor) -> Tensor:
        return self.block(torch.cat((x, *skip), dim=1) if skip else x, None)


class Attention(nn.Module):
    """Self-attention over all places, then a feed-forward, each with its residual."""

    def __init__(self, channels: int, heads: int, norm_groups: int):
        super().__init__()
        self.block = Transformer2DModel(num_attention_heads=heads, attention_head_dim=channels // heads,
                                        in_channels=channels, norm_num_groups=norm_groups, activation_fn="geglu")
        (transformer,) = self.block.transformer_blocks
        transformer.ff = PartwiseFeedForward(transformer.ff)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, return_dict=False)[0]


class DownBlock(nn.Module):
    """Two pairs (resnet, attention), merged after each, then a downsampler where there is one.

    A resnet that changes the width stands before the streams; all others are couplings.
    """

    def __init__(self, in_channels: int, channels: int, heads: int, norm_groups: int, factor: int, num_steps: int,
                 downsample: bool):
        super().__init__()
        self.entry = Resnet(in_channels, channels, norm_groups) if in_channels != channels else None
        self.input_scale = nn.Parameter(torch.ones(1))  # s
        self.chains = nn.ModuleList()
        for pair in range(PAIRS_DOWN):
            resnet = [] if pair == 0 and self.entry is not None else [Resnet(channels, channels, norm_groups)]
            bodies = [*resnet, *_injected_attention(channels, heads, norm_groups, factor, num_steps)]
            self.chains.append(ReversibleChain(map(WeightedCoupling, bodies)))
        self.merge_scales = nn.Parameter(torch.zeros(PAIRS_DOWN))  # m of each pair
        self.downsample = Downsample2D(channels, use_conv=True, padding=1, name="op") if downsample else None

    def forward(self, x: Tensor, injection: Injection, reversible: bool) -> tuple[Tensor, list[Tensor]]:
        """(batch, in_channels, h, w) -> features for the next block, and the skips of this one."""
        x1, x2 = _recomputed(self._streams, x, reversible=reversible)
        skips = []
        for chain, merge_scale in zip(self.chains, self.merge_scales.split(1), strict=True):
            # The next pair goes on from the streams, not from their merger.
            contexts = [injection if isinstance(coupling.body, Injector) else () for coupling in chain]
            x1, x2 = chain(x1, x2, contexts, reversible=reversible)
            x = x1 + merge_scale * x2
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x, skips

    def _streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _split(x if self.entry is None else self.entry(x), self.input_scale)


class UpBlock(nn.Module):
    """Three pairs (resnet, attention), each taking a skip, merged at the end; then an upsampler where there is one.

    The first resnet stands before the streams, the others are couplings.  The upsampler is the next block's to call: it
    is computed again for backward together with that block's beginning, and its wide output is not kept.
    """

    def __init__(self, in_channels: int, channels: int, skip_channels: list[int], heads: int, norm_groups: int,
                 factor: int, num_steps: int, upsample: bool):
        super().__init__()
        self.entry = Resnet(in_channels + skip_channels[0], channels, norm_groups)
        self.input_scale = nn.Parameter(torch.ones(1))  # s
        attention = channels, heads, norm_groups, factor, num_steps
        bodies = _injected_attention(*attention)
        for skip in skip_channels[1:]:
            bodies += [Resnet(channels + skip, channels, norm_groups), *_injected_attention(*attention)]
        self.chain = ReversibleChain(map(WeightedCoupling, bodies))
        self.merge_scale = nn.Parameter(torch.zeros(1))  # m
        self.upsample = Upsample2D(channels, use_conv=True) if upsample else None

    def forward(self, x: Tensor, widen: Callable[[Tensor], Tensor], skips: list[Tensor], injection: Injection,
                reversible: bool) -> Tensor:
        """x and widen(x), (batch, in_channels, h, w) -> (batch, channels, h, w)."""
        first, *others = skips
        x1, x2 = _recomputed(self._streams, x, widen, first, reversible=reversible)
        remaining = iter(others)
        kinds = {Injector: lambda: injection, Resnet: lambda: (next(remaining),), Attention: tuple}
        contexts = [kinds[type(coupling.body)]() for coupling in self.chain]
        x1, x2 = self.chain(x1, x2, contexts, reversible=reversible)
        return x1 + self.merge_scale * x2

    def _streams(self, x: Tensor, widen: Callable[[Tensor], Tensor], skip: Tensor) -> tuple[Tensor, Tensor]:
        return _split(self.entry(widen(x), skip), self.input_scale)


class UNet(nn.Module):
    """The noise estimator ε, (batch, shuffle², h, w) -> the same shape; h and w even.

    Args:
        block_out_channels: widths of the two scales, multiples of heads and of norm_groups.
        num_steps: T, how many sampling steps the injectors have weights for.
        shuffle: side of the image by side of the features at the first scale.
        heads: attention heads.
        norm_groups: groups of every group norm.
    """

    def __init__(self, block_out_channels: tuple[int, int], num_steps: int, shuffle: int, heads: int, norm_groups: int):
        super().__init__()
        wide, narrow = block_out_channels[1], block_out_channels[0]
        first = {"heads": heads, "norm_groups": norm_groups, "factor": shuffle, "num_steps": num_steps}
        second = {**first, "factor": 2 * shuffle}
        self.shuffle = shuffle
        self.conv_in = FullPrecisionConv2d(shuffle**2, narrow, kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList([
            DownBlock(narrow, narrow, downsample=True, **first),
            DownBlock(narrow, wide, downsample=False, **second),
        ])
        self.up_blocks = nn.ModuleList([
            UpBlock(2 * wide, wide, [wide, wide, narrow], upsample=True, **second),
            UpBlock(wide, narrow, [narrow, narrow, narrow], upsample=False, **first),
        ])
        self.conv_norm_out = nn.GroupNorm(norm_groups, narrow, eps=1e-5)
        self.conv_out = FullPrecisionConv2d(narrow, shuffle**2, kernel_size=3, padding=1)
        self.reversible = True

    def forward(self, x: Tensor, back_projection: Tensor, operator: LinearOperator, step: int) -> Tensor:
        apart = getattr(operator, "same_for_all", False)  # another library's operator may hold something of each image
        if not (self.reversible and torch.is_grad_enabled() and apart):
            return self._noise(x, back_projection, operator, step)
        samples = max(1, PLACES_AT_ONCE // (x.shape[-2] * x.shape[-1]))
        parts = zip(x.split(samples), back_projection.split(samples), strict=True)
        return torch.cat([self._noise(*part, operator, step) for part in parts])

    def _noise(self, x: Tensor, back_projection: Tensor, operator: LinearOperator, step: int) -> Tensor:
        injection = (back_projection, operator, step)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, injection, self.reversible)
            skips += new
        widen = _doubled  # stands for the removed up block, which would deliver twice the width
        for block in self.up_blocks:
            x = block(x, widen, [skips.pop() for _ in range(PAIRS_UP)], injection, self.reversible)
            widen = block.upsample
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _injected_attention(channels: int, heads: int, norm_groups: int, factor: int, num_steps: int) -> list[nn.Module]:
    return [Injector(channels, factor, num_steps), Attention(channels, heads, norm_groups),
            Injector(channels, factor, num_steps)]


def _split(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of streams (x, s·x), in the precision of the weights."""
    x = x.to(scale.dtype)
    return x, scale * x


def _doubled(x: Tensor) -> Tensor:
    return torch.cat((x, x), dim=1)


def _recomputed(f: Callable, *inputs: Any, reversible: bool) -> Any:
    """f(*inputs), f a module's method; where the network is reversible, what it computes on the way is computed again.

    Then with the parameters that the modules have now, for `torch.func.functional_call` takes its own out again.
    """
    if not (reversible and torch.is_grad_enabled()):
        return f(*inputs)
    modules = [f.__self__, *(item for item in inputs if isinstance(item, nn.Module))]
    now = [(part._parameters, name, tensor) for module in modules for part in module.modules()
           for name, tensor in part._parameters.items()]
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (nullcontext(), holding(now)))
