"""Watch a network at work: how far it is within a picture, and what the picture looks like after each sampling step."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .idm import IDM, SamplingStep
from .unet import Attention, Resnet


@contextmanager
def watching(
    net: IDM,
    progress: Callable[[float], None] | None = None,  # gets the share of a reconstruction that is done, up to 1
    estimate: Callable[[int, Tensor], None] | None = None,  # gets t and the image after step t: (batch, 1, H, W)
) -> Iterator[None]:
    """Call `progress` after every block of the U-Net and `estimate` after every sampling step, t = T, ..., 1.

    The share is of the multiplications, so that it tells the time as well; it counts on where the network is called
    again.  The image, f_t / √ᾱ_{t−1}, is not clamped, and padded where the network pads.  What these functions raise
    ends the reconstruction.
    """
    handles = []
    if progress is not None:
        watch = _Progress(net, progress)
        handles = [net.unet.register_forward_pre_hook(watch.begin),
                   *(block.register_forward_hook(watch.advance) for block in watch.blocks)]
    if estimate is not None:
        watch = _Estimates(estimate)
        handles += [net.schedule.register_forward_hook(watch.begin),
                    *(part.register_forward_hook(watch.advance) for part in net.modules()
                      if isinstance(part, SamplingStep))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Progress:
    """The work that is done, in multiplications."""

    def __init__(self, net: IDM, tell: Callable[[float], None]):
        self.net, self.tell, self.done, self.total = net, tell, 0.0, 0.0
        (down1, down2), (up2, up1) = net.unet.down_blocks, net.unet.up_blocks
        self.blocks = {module: scale for scale, parts in enumerate(((down1, up1), (down2, up2))) for part in parts
                       for module in part.modules() if isinstance(module, Resnet | Attention)}
        self.work: dict[nn.Module, float] = {}

    def begin(self, unet: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Find out, before each pass of the U-Net, what there is to do: `inputs` begin with its image."""
        batch, _, height, width = inputs[0].shape
        windows = self.net.attention_window
        for block, scale in self.blocks.items():
            tokens = height * width / 4**scale
            self.work[block] = batch * tokens * sum(parameter.numel() for parameter in block.parameters())
            if isinstance(block, Attention):
                seen = min(tokens, (windows[scale] or tokens)**2)
                self.work[block] += batch * tokens * 2 * seen * block.block.proj_in.in_channels
        self.total = self.net.config.num_steps * sum(self.work.values())

    def advance(self, block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.done += self.work[block]
        self.tell(self.done / self.total)


class _Estimates:
    """The image after each step."""

    def __init__(self, tell: Callable[[int, Tensor], None]):
        self.tell = tell
        self.alpha_bar: Tensor | None = None

    def begin(self, schedule: nn.Module, inputs: tuple[Any, ...], alpha_bar: Tensor) -> None:
        self.alpha_bar = alpha_bar.reshape(-1, alpha_bar.shape[-1])  # (batch or 1, T + 1)

    def advance(self, body: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        *_, step = inputs
        self.tell(step, output / self.alpha_bar[:, step - 1].sqrt().view(-1, 1, 1, 1))
