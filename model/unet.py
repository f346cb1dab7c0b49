"""Level two: Stable Diffusion's U-Net, cut down, its blocks written as reversible chains (paper, section 3.2).

Left of UNet2DConditionModel are two down blocks and two up blocks, without time embedding, mid block, cross-attention.
Around every attention stand two injectors.  Inside a block the features are a pair of streams (x, s·x), which chains of
couplings carry through and m merges again as x₁ + m·x₂.

                    skips                 widths
    conv_in         conv_in               narrow
    down block 0    down_0.pair_0         narrow
                    down_0.pair_1
                    down_0.downsampled
    down block 1    down_1.pair_0         wide
                    down_1.pair_1
    up block 0      reads the last three  wide
    up block 1      reads the first three narrow
    conv_out
"""
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from . import strips
from .attention import Transformer
from .injector import Injector
from .operators import LinearOperator
from .precision import FullPrecisionConv2d
from .reversible import ReversibleChain, recomputed


@dataclass
class Reversal:
    """How the U-Net is differentiated."""

    reversible: bool = True  # compute couplings again, one by one; False: plain autograd
    store_every: int | None = 1  # see `ReversibleChain`
    entries: bool = True  # compute again what stands between the chains, too


@dataclass
class Inputs:
    """What a module of a chain may read beside its features; its `reads` says which."""

    back_projection: Tensor  # A⁺y, (batch, in_channels, H, W)
    operator: LinearOperator
    step: int  # t
    skips: dict[str, Tensor] = field(default_factory=dict)  # by the names above
    reversal: Reversal = field(default_factory=Reversal)
    _folded: dict[int, Tensor] = field(default_factory=dict)

    def folded(self, factor: int) -> Tensor:
        """The back-projection at the size of features: (batch, factor², H / factor, W / factor)."""
        if factor not in self._folded:
            self._folded[factor] = F.pixel_unshuffle(self.back_projection, factor)
        return self._folded[factor]


class Resnet(nn.Module):
    """Residual convolutions, on the features with a skip concatenated behind them where there is one."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, skip: str | None = None):
        super().__init__()
        self.skip = skip
        self.block = ResnetBlock2D(in_channels=in_channels, out_channels=out_channels, temb_channels=None,
                                   groups=norm_groups, eps=1e-5, non_linearity="silu")

    def reads(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return (inputs.skips.pop(self.skip),) if self.skip else ()  # nothing else reads it, nor should keep it

    def forward(self, x: Tensor, *skip: Tensor) -> Tensor:
        if strips.worthwhile(x):
            return strips.resnet(self.block, x, *skip)
        block, x = self.block, torch.cat((x, *skip), dim=1) if skip else x
        change = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
        return change + (x if block.conv_shortcut is None else block.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention of all features, or within windows, then a feed-forward, each with its residual."""

    def __init__(self, channels: int, heads: int, norm_groups: int, window: int | None):
        super().__init__()
        self.block = Transformer(channels, heads, norm_groups, window)

    def reads(self, inputs: Inputs) -> tuple[()]:
        return ()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Residual(nn.Module):
    """What a body adds to its features: F or G of a coupling of two bodies."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def reads(self, inputs: Inputs) -> tuple:
        return self.body.reads(inputs)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return self.body(x, *context) - x


@dataclass(frozen=True)
class Scale:
    """What the blocks of one scale have in common.

    A coupling of one body is made of any module f, and its streams are (x, s·x) of all channels.  One of two bodies, as
    the additive coupling, is made of residual functions F and G, and its streams are the halves of the channels.
    """

    channels: int
    factor: int  # side of the image by side of the features
    num_steps: int  # T
    heads: int
    norm_groups: int
    attention: bool  # whether there is any
    window: int | None  # side of attention's windows, in tokens; None: all attend to all
    coupling: type[nn.Module]
    in_channels: int = 1  # of the images

    @property
    def halves(self) -> bool:
        """Whether the streams are the halves of the channels."""
        return getattr(self.coupling, "bodies", 1) == 2

    @property
    def width(self) -> int:
        """Channels of a stream."""
        return self.channels // 2 if self.halves else self.channels

    def resnet(self, skip_channels: int = 0, skip: str | None = None) -> Resnet:
        return Resnet(self.width + skip_channels, self.width, self.norm_groups, skip)

    def injected_attention(self) -> list[nn.Module]:
        """Attention between two injectors; without it, the injectors alone."""
        attention = self.width, self.heads, self.norm_groups, self.window
        injector = self.width, self.factor, self.num_steps, self.in_channels
        return [Injector(*injector), *([Attention(*attention)] if self.attention else []), Injector(*injector)]

    def chain(self, bodies: list[nn.Module]) -> ReversibleChain:
        """Couplings of these bodies, one after the other; of two bodies each, the last one of an odd number alone."""
        if not self.halves:
            return ReversibleChain(map(self.coupling, bodies))
        functions = list(map(Residual, bodies))
        return ReversibleChain(self.coupling(*functions[i:i + 2]) for i in range(0, len(functions), 2))

    def scale_parameter(self, *values: float) -> nn.Parameter | None:
        """A learned s or m; the halves have none."""
        return None if self.halves else nn.Parameter(torch.tensor(values))


class DownBlock(nn.Module):
    """Two pairs (resnet, attention), merged after each, then a downsampler where there is one.

    A resnet that changes the width stands before the streams; all others are couplings.

    Args:
        name: of the block, with which the names of its skips begin.
    """

    PAIRS = 2

    def __init__(self, name: str, scale: Scale, in_channels: int, downsample: bool):
        super().__init__()
        self.name, self.halves, channels = name, scale.halves, scale.channels
        self.entry = Resnet(in_channels, channels, scale.norm_groups) if in_channels != channels else None
        self.input_scale = scale.scale_parameter(1.0)  # s
        self.chains = nn.ModuleList()
        for pair in range(self.PAIRS):
            resnet = [] if pair == 0 and self.entry is not None else [scale.resnet()]
            self.chains.append(scale.chain([*resnet, *scale.injected_attention()]))
        self.merge_scales = scale.scale_parameter(*[0.0] * self.PAIRS)  # m of each pair
        self.downsample = Downsample2D(channels, use_conv=True, padding=1, name="op") if downsample else None

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        """(batch, in_channels, h, w) -> features for the next block; the skips of this one go into `inputs`."""
        x1, x2 = _split(self, x if self.entry is None else _between_chains(self.entry, inputs, x))
        for pair, chain in enumerate(self.chains):
            # The next pair goes on from the streams, not from their merger.
            x1, x2 = _through(chain, inputs, x1, x2, self.halves)
            merge_scale = None if self.merge_scales is None else self.merge_scales[pair:pair + 1]
            x = inputs.skips[f"{self.name}.pair_{pair}"] = _merged(x1, x2, merge_scale)
        if self.downsample is not None:
            x = inputs.skips[f"{self.name}.downsampled"] = self.downsample(x)
        return x


class UpBlock(nn.Module):
    """Three pairs (resnet, attention), each reading a skip, merged at the end; then an upsampler where there is one.

    The first resnet stands before the streams, the others are couplings.

    Args:
        skips: names of the skips that the resnets read, and their channels.
    """

    def __init__(self, scale: Scale, in_channels: int, skips: dict[str, int], upsample: bool):
        super().__init__()
        self.halves = scale.halves
        (first, first_channels), *others = skips.items()
        self.entry = Resnet(in_channels + first_channels, scale.channels, scale.norm_groups, first)
        self.input_scale = scale.scale_parameter(1.0)  # s
        bodies = scale.injected_attention()
        for name, skip_channels in others:
            bodies += [scale.resnet(skip_channels, name), *scale.injected_attention()]
        self.chain = scale.chain(bodies)
        self.merge_scale = scale.scale_parameter(0.0)  # m
        self.upsample = Upsample2D(scale.channels, use_conv=True) if upsample else None

    def forward(self, features: list[Tensor], inputs: Inputs) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, channels, h, w), or (batch, channels, 2h, 2w) with an upsampler.

        The features are taken out of the list, so that nobody holds them while the streams are computed.
        """
        x = _between_chains(self.entry, inputs, features.pop(), *self.entry.reads(inputs))
        x1, x2 = _through(self.chain, inputs, *_split(self, x), self.halves)
        x = _merged(x1, x2, self.merge_scale)
        if self.upsample is None:
            return x
        return strips.upsample(self.upsample, x) if strips.worthwhile(x) else _between_chains(self.upsample, inputs, x)


class UNet(nn.Module):
    """The noise estimator ε, (batch, in_channels · shuffle², h, w) -> the same shape; h and w even.

    Args:
        narrow: the first scale, of the image folded by its factor.
        wide: the second scale, of half the sides.
    """

    def __init__(self, narrow: Scale, wide: Scale):
        super().__init__()
        self.shuffle, self.halves, n, w = narrow.factor, narrow.halves, narrow.channels, wide.channels
        self.conv_in = FullPrecisionConv2d(narrow.in_channels * self.shuffle**2, n, kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList([
            DownBlock("down_0", narrow, n, downsample=True),
            DownBlock("down_1", wide, n, downsample=False),
        ])
        self.up_blocks = nn.ModuleList([
            UpBlock(wide, 2 * w, {"down_1.pair_1": w, "down_1.pair_0": w, "down_0.downsampled": n}, upsample=True),
            UpBlock(narrow, w, {"down_0.pair_1": n, "down_0.pair_0": n, "conv_in": n}, upsample=False),
        ])
        self.conv_norm_out = nn.GroupNorm(narrow.norm_groups, n, eps=1e-5)
        self.conv_out = FullPrecisionConv2d(n, narrow.in_channels * self.shuffle**2, kernel_size=3, padding=1)
        self.reversal = Reversal()

    def forward(self, x: Tensor, back_projection: Tensor, operator: LinearOperator, step: int) -> Tensor:
        inputs = Inputs(back_projection, operator, step, reversal=self.reversal)
        x = inputs.skips["conv_in"] = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, inputs)
        features = [torch.cat((x, x), dim=1)]  # stands for the removed up block, which would deliver twice the width
        del x
        for block in self.up_blocks:
            features.append(block(features, inputs))
        return self.conv_out(F.silu(self.conv_norm_out(features.pop())))

    def set_attention_windows(self, narrow: int | None, wide: int | None) -> None:
        for blocks, sides in ((self.down_blocks, (narrow, wide)), (self.up_blocks, (wide, narrow))):
            for block, side in zip(blocks, sides, strict=True):
                for module in block.modules():
                    if isinstance(module, Transformer):
                        module.window = side


def bodies_of(coupling: nn.Module) -> list[nn.Module]:
    """The modules of the U-Net that a coupling is made of."""
    return [part for part in coupling.children() if hasattr(part, "reads")]


def _contexts(chain: ReversibleChain, inputs: Inputs, halves: bool) -> list[tuple]:
    """What the bodies of each coupling say that they read: of a single body, or a tuple for each of two."""
    reads = [tuple(body.reads(inputs) for body in bodies_of(coupling)) for coupling in chain]
    return reads if halves else [own for (own,) in reads]


def _through(chain: ReversibleChain, inputs: Inputs, x1: Tensor, x2: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """Return the streams after a chain."""
    reversal = inputs.reversal
    return chain(x1, x2, _contexts(chain, inputs, halves), reversible=reversal.reversible,
                 store_every=reversal.store_every)


def _between_chains(module: nn.Module, inputs: Inputs, *x: Tensor) -> Tensor:
    reversal = inputs.reversal
    if reversal.reversible:
        return recomputed(module, *x, keep=not reversal.entries)
    return module(*(each.view_as(each) for each in x))  # gradients are summed up in the same order


def _split(block: DownBlock | UpBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of streams: (x, s·x), or without s the halves of the channels; in the precision of the weights."""
    x = x.to(next(block.parameters()).dtype)
    return x.tensor_split(2, dim=1) if block.halves else (x, block.input_scale * x)


def _merged(x1: Tensor, x2: Tensor, scale: Tensor | None) -> Tensor:
    """x₁ + m x₂, or without m the halves put together again."""
    return torch.cat((x1, x2), dim=1) if scale is None else x1 + scale * x2

