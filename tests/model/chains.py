"""Small chains in float64, for tests of the engine against plain autograd."""
import torch
from torch import Tensor, nn

from model.couplings import WeightedCoupling
from model.reversible import ReversibleChain


class Body(nn.Module):
    """f(x, *context): reads tensors, modules and plain numbers alike."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.unused = nn.Parameter(torch.zeros(1))  # as the injectors of other steps are

    def forward(self, x: Tensor, *context) -> Tensor:
        out = self.linear(x)
        for item in context:
            out = out + (item(x) if isinstance(item, nn.Module) else item * x)
        return x + torch.tanh(out)


def make_chain(depth: int, width: int = 6, dtype: torch.dtype = torch.float64) -> ReversibleChain:
    torch.manual_seed(depth)
    chain = ReversibleChain(WeightedCoupling(Body(width), v=0.3 + 0.1 * i % 0.5) for i in range(depth))
    return chain.to(dtype)


def make_contexts(width: int = 6, dtype: torch.dtype = torch.float64):
    """Contexts of five couplings: one tensor shared by three of them, a module with parameters shared by two."""
    torch.manual_seed(7)
    shared = torch.randn(3, width, dtype=dtype, requires_grad=True)
    single = torch.randn(1, dtype=dtype, requires_grad=True)
    constant = torch.randn(3, width, dtype=dtype)
    module = nn.Linear(width, width).to(dtype)
    contexts = [(shared, 2), (), (single, shared), (constant, module), (module, 0.5, shared)]
    return contexts, [shared, single, *module.parameters()]


def streams(width: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return tuple(torch.randn(3, width, dtype=dtype, requires_grad=True) for _ in range(2))


def loss_of(y1: Tensor, y2: Tensor) -> Tensor:
    return (y1.float().sin() if y1.dtype == torch.half else y1.sin()).sum() + (y2**2 * 0.7).sum()


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def used(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that have gradients."""
    return [parameter for name, parameter in module.named_parameters() if "unused" not in name]
