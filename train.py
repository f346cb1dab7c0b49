"""Train IDM end to end (paper, section 4): one process by `python train.py`, several by `torch.distributed.run`."""
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils import distributed, errors
from utils.devices import computing_in
from utils.training.losses import LOSSES
from utils.training.settings import parse_settings
from utils.training.update import update

if TYPE_CHECKING:
    from utils.training.run import Run


def train_step(
    run: "Run",
    batches: Iterator[Tensor],  # crops (batch, 1, P, P) uint8, one after the other
) -> tuple[Tensor, Tensor]:
    """One iteration: measure crops, reconstruct them, and move the weights against the gradient of the loss.

    Returns the loss, a mean over this process's batches, and the norm of its gradient.
    """
    settings, device, losses = run.settings, run.process.device, []
    for slot in run.slots:  # batches whose gradients are added up
        pixels, draw = next(batches).to(device, non_blocking=True), run.draw(slot)
        x = draw.turned(pixels)  # (batch, 1, P, P) in [0, 1], in one of eight orientations
        y, noise_level = draw.measure(x)  # y = A x + sigma n
        with computing_in(settings.precision, device), run.exchanging(slot):
            x_hat = run.model(y, draw.operator, noise_level=noise_level, steps=draw.steps)
        loss = LOSSES[settings.loss](x_hat.float(), x)
        finite = 1 + 0 * loss.detach()  # 1, or nan: a loss that is not finite shows in the gradients of all processes
        run.scaler.scale(finite * loss / settings.accumulate).backward()
        losses.append(loss.detach())
    loss = torch.stack(losses).mean()
    return loss, update(run, loss)


def main() -> None:
    settings = parse_settings(__doc__)
    from utils.training.loop import train  # these import the network, which takes seconds: flags are read first
    from utils.training.start import open_run

    run, unlogged = open_run(settings, distributed.start(settings.device))
    finished = train(run, train_step, unlogged)
    if run.log:
        run.log.close()
    distributed.stop()
    if not finished:
        sys.exit(errors.INTERRUPTED)


if __name__ == "__main__":
    errors.run(main)
