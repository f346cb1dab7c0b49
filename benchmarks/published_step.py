"""The published way of back-propagating a step, on our own modules: the baseline that training_step.py compares with.

There, a chain's skips are no inputs of its autograd function, but live tensors that the resnets read.  Backward inverts
coupling by coupling and calls `torch.autograd.backward` for each, on a retained graph: whatever f has read has its
gradient added to `.grad` on the spot.  So a skip sends its gradient through all of the down path, whose chains are
inverted and computed once more for it, and the next skip does so again.  On one process the gradients are the same as
ours; with several, DistributedDataParallel does not see what is added to `.grad` behind its back.
"""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import IDM
from model.reversible import ReversibleChain


class _PublishedChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain: ReversibleChain, contexts: Sequence[tuple], x1: Tensor, x2: Tensor):
        ctx.links = list(zip(chain, contexts, strict=True))
        for coupling, context in ctx.links:
            x1, x2 = coupling(x1, x2, *context)
        ctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad1: Tensor, grad2: Tensor):
        y1, y2 = ctx.saved_tensors
        for coupling, context in reversed(ctx.links):
            x1 = y2.detach().requires_grad_()
            with torch.enable_grad():
                fx = coupling.body(x1, *context)
            x2 = coupling.unmix(fx.detach(), y1)
            torch.autograd.backward(fx, (1 - coupling.v) * grad1, retain_graph=True)
            _add(coupling.v, (grad1 * (x2 - fx.detach())).sum().reshape(1))
            grad1, grad2 = x1.grad + grad2, coupling.v * grad1
            y1, y2 = x1.detach(), x2
        return None, None, grad1, grad2


def _add(parameter: Tensor, grad: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad


def _forward(chain: ReversibleChain, x1: Tensor, x2: Tensor, contexts: Sequence[tuple], **_) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        return _PublishedChain.apply(chain, contexts, x1, x2)
    for coupling, context in zip(chain, contexts, strict=True):
        x1, x2 = coupling(x1, x2, *context)
    return x1, x2


@contextmanager
def published(net: IDM) -> Iterator[None]:
    """Within, all chains of `net` run the published way, both levels inverted throughout."""
    invertible, chains = net.invertible, [part for part in net.modules() if isinstance(part, ReversibleChain)]
    net.invertible = "none"  # the way of the chains aside, nothing is computed again
    for chain in chains:
        chain.forward = partial(_forward, chain)
    try:
        yield
    finally:
        for chain in chains:
            del chain.forward
        net.invertible = invertible
