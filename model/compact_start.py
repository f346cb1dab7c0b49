"""Initial values for compact networks, which no Stable Diffusion precedes: wired for images, not yet knowing any.

The features of the first scale hold images, which run unchanged from end to end: twice x̂_t, the noise estimate ε, −ε,
and notes.  Each injector forms the image x₀ that x̂_t and ε stand for, and corrects ε by what A x₀ lacks of y.  The last
layer of every residual branch is zero, so that the network returns about Aᵀy, and training adds to this what is unseen.
"""
from typing import TYPE_CHECKING

import torch
from torch import nn

from .injector import Injector
from .schedules import LearnedSchedule
from .unet import Attention, Resnet, UNet

if TYPE_CHECKING:
    from .idm import IDM

IMAGES = 4  # that the first scale must have room for
_SPREAD = 0.368  # of the features before the last group norm, which divides by it; measured at width 64, T = 3


@torch.no_grad()
def start(net: "IDM") -> None:
    """Give a network these initial values; of images of two channels, or without room for IMAGES, it just estimates 0.

    v of the weighted coupling is 0.01 in all steps but the first, where it makes up for the step's greater noise level.
    """
    levels = _noise_levels(net.schedule, net.config.num_steps)
    if net.unet.halves and net.config.in_channels == 1:
        _start_halves(net.unet)
        return
    with_v = all(hasattr(coupling, "v") for coupling in net.steps)
    for coupling in net.steps if with_v else []:
        nn.init.constant_(coupling.v, 0.01)
    if with_v and len(levels) > 1:
        nn.init.constant_(net.steps[0].v, 1 - levels[-1] / levels[-2])
    if net.config.in_channels == 1:
        _start_unet(net.unet, levels)
    else:
        _zero(net.unet.conv_out)


def _noise_levels(schedule: nn.Module, num_steps: int) -> list[float]:
    """c_t = √((1 − ᾱ_t) / ᾱ_t), t = 1..T: what one unit of estimated noise is worth at step t.

    Learned alphas are set to give the levels that suit images; of another schedule they are what it begins with.
    """
    if isinstance(schedule, LearnedSchedule):
        levels = [0.7 * (t / num_steps) ** 1.75 for t in range(1, num_steps + 1)]
        for alpha, before, level in zip(schedule.alpha, [0, *levels], levels, strict=False):
            alpha.fill_((1 + before**2) / (1 + level**2))  # 1 + c_t² = 1 / ᾱ_t
        return levels
    alpha_bar = schedule(torch.zeros(1, 1, 32, 32))[0, 1:]
    return ((1 - alpha_bar) / alpha_bar).sqrt().tolist()


def _start_unet(unet: UNet, levels: list[float]) -> None:
    _zero(unet.conv_out)
    pixels = unet.shuffle**2
    if unet.conv_in.out_channels < IMAGES * pixels:
        return
    for module in unet.modules():
        if isinstance(module, Resnet):
            _zero(module.block.conv2)
        elif isinstance(module, Attention):
            _zero(module.block.proj_out)
        elif isinstance(module, Injector):
            _start_injector(module, levels)
    _pass_images_through(unet)
    _note_step_and_ratio(unet)
    for pixel in range(pixels):  # silu(a) − silu(−a) = a
        unet.conv_out.weight[pixel, pixels + pixel, 1, 1] = _SPREAD
        unet.conv_out.weight[pixel, 2 * pixels + pixel, 1, 1] = -_SPREAD


def _start_halves(unet: UNet) -> None:
    """Streams that are halves of the channels have no room for the images: all F and G begin with 0, and so does ε."""
    _zero(unet.conv_out)
    for module in unet.modules():
        if isinstance(module, Resnet):
            _zero(module.block.conv2)
            if module.block.conv_shortcut is not None:
                _take(module, 0)
        elif isinstance(module, Attention):
            _zero(module.block.proj_out)
        elif isinstance(module, Injector):
            for unlift in module.unlift:
                _zero(unlift)


def _start_injector(injector: Injector, levels: list[float]) -> None:
    """x₀ = √(1 + c²) x̂_t − c ε;  ε loses (Aᵀy − AᵀA x₀) / c, which makes A x₀ = y."""
    for c, lift, unlift in zip(levels, injector.lift, injector.unlift, strict=True):
        _zero(lift)
        _zero(unlift)
        lack = torch.tensor([0.0, -1.0, 1.0]).view(3, 1, 1)  # of [z, AᵀA z, Aᵀy]
        lift.weight[0, 0] = (1 + c * c) ** 0.5 / 2
        lift.weight[0, 1] = -c
        unlift.weight[1] = -lack / c
        if unlift.out_channels >= IMAGES:  # at widths below 128, the second scale has no room for −ε and notes
            lift.weight[0, 1:3] = torch.tensor([-c / 2, c / 2]).view(2, 1, 1)
            unlift.weight[2] = lack / c
            unlift.weight[3] = 2 * lack


def _pass_images_through(unet: UNet) -> None:
    pixels, width, side = unet.shuffle**2, unet.conv_in.out_channels, unet.shuffle
    unet.conv_in.weight[:IMAGES * pixels] = 0
    unet.conv_in.bias[:IMAGES * pixels] = 0
    for pixel in range(pixels):
        unet.conv_in.weight[pixel, pixel, 1, 1] = 2
    notes = unet.conv_in.bias[3 * pixels:IMAGES * pixels]
    notes[0::2], notes[1::2] = 0.5, -0.5  # a norm over all channels then leaves the brightness in
    down = unet.down_blocks[0].downsample.conv
    _zero(down)
    for pixel in range(4 * pixels):
        y, x = divmod(pixel, 2 * side)
        down.weight[pixel, y % side * side + x % side, 1 + y // side, 1 + x // side] = 1
    first, second = unet.up_blocks
    for resnet, start in ((unet.down_blocks[1].entry, 0), (first.entry, 0), (second.entry, 2 * width)):
        _take(resnet, start)  # the last from its skip
    for block in (first, second):
        for coupling in block.chain:
            if isinstance(coupling.body, Resnet):
                _take(coupling.body, 0)


def _note_step_and_ratio(unet: UNet) -> None:
    """The first injector writes down t; the second AᵀA 1, whose mean is the ratio."""
    first, second = (coupling.body for coupling in unet.down_blocks[0].chains[0] if isinstance(coupling.body, Injector))
    for t, unlift in enumerate(first.unlift, start=1):
        unlift.bias[3] = t - (len(first.unlift) + 1) / 2
    for lift, unlift in zip(second.lift, second.unlift, strict=True):
        _zero(lift)
        lift.bias.fill_(1)
        _zero(unlift)
        unlift.weight[3, 1] = 1


def _take(resnet: Resnet, start: int) -> None:
    """Let the shortcut hand on the input channels from `start` on."""
    shortcut = resnet.block.conv_shortcut
    _zero(shortcut)
    for channel in range(min(shortcut.out_channels, shortcut.in_channels - start)):
        shortcut.weight[channel, start + channel] = 1


def _zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
