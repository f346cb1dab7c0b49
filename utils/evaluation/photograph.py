"""Reconstruct one picture and tell meanwhile how far it is: what reconstruct.py and the page in a browser do."""
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from model import IDM, SelfEnsemble
from model.settings import for_both
from model.watch import watching
from utils.devices import computing_in, memory_suffices
from utils.evaluation.evaluate import Measured, settings_for

LARGEST_WHOLE = 512 * 512  # pixels of a picture in which every token attends to every other
WINDOW = 32  # tokens a side, in larger pictures
ORIENTATIONS = 8  # of a self-ensemble


Window = tuple[int | None, int | None]  # in tokens, of the two scales; None: all tokens


def fitting_window(
    trained: Window,  # that the network was trained with
    pixels: int,  # of the picture
    asked: int | None = None,  # by the user
) -> Window:
    """Return the attention window for a picture: as asked, else as trained, else none but in large pictures."""
    if asked is not None:
        return asked, asked
    return (WINDOW, WINDOW) if trained == (None, None) and pixels > LARGEST_WHOLE else trained


def window_note(net: IDM) -> list[str]:
    """Return what is to be said where a network has attention, and that works in windows."""
    has = for_both(net.config.attention, "attention")
    sides = [side for side, there in zip(net.attention_window, has, strict=True) if there and side]
    return [f"attention in windows of {sides[0]} tokens"] if sides else []


@torch.inference_mode()
def recover(
    network: IDM | SelfEnsemble,
    measured: Measured,
    precision: str = "fp32",
    progress: Callable[[float], None] | None = None,  # gets the share that is done
    estimate: Callable[[int, Tensor], None] | None = None,  # gets t and the image after step t; see `watching`
) -> tuple[Tensor, float]:
    """Return x_hat (batch, 1, H, W), not clamped, and the seconds it took; raises UserError where memory runs out."""
    net, passes = (network.net, ORIENTATIONS) if isinstance(network, SelfEnsemble) else (network, 1)
    shares = None if progress is None else lambda share: progress(share / passes)
    watch = watching(net, shares, estimate) if progress or estimate else nullcontext()
    start = time.perf_counter()
    with memory_suffices("for a picture of this size; crop it, or choose a smaller --attention_window"), watch, \
            computing_in(precision, net.device):
        x_hat = network(measured.y, measured.operator, **settings_for(network, measured.noise_level)).cpu()
    return x_hat, time.perf_counter() - start
