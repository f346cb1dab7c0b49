"""What an iteration does with the gradients: the optimizer's step, and the average of the weights."""
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from utils.devices import memory_suffices
from utils.training.learning_rate import learning_rate

if TYPE_CHECKING:
    from utils.training.run import Run


@torch.no_grad()
def update(run: "Run", loss: Tensor) -> Tensor:
    """One step of Adam, or none where the gradients are not finite; returns their norm."""
    settings = run.settings
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(settings, run.progress.iteration)
    run.scaler.unscale_(run.optimizer)
    norm = get_total_norm([parameter.grad for parameter in run.net.parameters() if parameter.grad is not None])
    if settings.clip:
        clip_grads_with_norm_(run.net.parameters(), settings.clip, norm)
    finite = norm.isfinite()
    if not run.scaler.is_enabled():  # which gives the optimizer this itself; 1 makes it leave the weights alone
        run.optimizer.found_inf = 1 - finite.float()
    with memory_suffices("for Adam's averages"):
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.ema:
        seen = run.iterations_of_weights
        decay = min(settings.ema, (1 + seen) / (10 + seen))  # the first weights are forgotten
        torch._foreach_lerp_(list(run.ema.parameters()), list(run.net.parameters()), 1 - decay)
    run.count(loss, finite)
    return norm
