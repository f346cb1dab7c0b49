"""Half precision part by part: any ingredient of a training step kept in fp32, or it alone in half (see
gradient_fidelity.py); and a CPU that computes in half precision as a GPU does.
"""
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from model import IDM, BlockCompressedSensing, LinearOperator
from model.couplings import WeightedCoupling
from model.injector import Injector
from model.precision import FullPrecisionConv2d
from model.unet import Attention, Resnet

aten = torch.ops.aten
PRODUCTS = {aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default,
            aten.bmm.default, aten.baddbmm.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            aten.linear.default, aten.conv2d.default, aten.scaled_dot_product_attention.default}  # in inference mode


class RoundedOnce(TorchDispatchMode):
    """Products of half-precision numbers are summed up in fp32 and rounded once, as tensor cores do.

    Without units for them, a CPU's own kernels take five to twenty times fp32's time; like this it is hardly more.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        halves = {item.dtype for item in args if isinstance(item, Tensor)} & {torch.bfloat16, torch.float16}
        if function not in PRODUCTS or not halves:
            return function(*args, **(kwargs or {}))
        (half,) = halves
        result = function(*tree_map(partial(_cast, source=half, target=torch.float32), args), **(kwargs or {}))
        down = partial(_cast, source=torch.float32, target=half)
        if function is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return down(result[0]), *result[1:]  # the softmax's denominators are fp32 always
        return tree_map(down, result)


def half_products(device: str) -> AbstractContextManager:
    """What to compute products of half-precision numbers in, on a device."""
    return RoundedOnce() if device == "cpu" else nullcontext()


def _cast(item, source: torch.dtype, target: torch.dtype):
    return item.to(target) if isinstance(item, Tensor) and item.dtype == source else item


def _all(net: IDM, kind: type[nn.Module]) -> list:
    return [module for module in net.modules() if isinstance(module, kind)]


def _transformers(net: IDM) -> list[nn.Module]:
    return [attention.block.transformer_blocks[0] for attention in _all(net, Attention)]


INGREDIENTS: dict[str, Callable[[IDM], list[nn.Module]]] = {
    "conv_in": lambda net: [net.unet.conv_in],
    "conv_out": lambda net: [net.unet.conv_out],
    "injectors' maps": lambda net: [conv for body in _all(net, Injector) for conv in (*body.lift, *body.unlift)],
    "resnets, 3x3 convolutions": lambda net: [conv for resnet in _all(net, Resnet)
                                              for conv in (resnet.block.conv1, resnet.block.conv2)],
    "resnets, shortcuts": lambda net: [resnet.block.conv_shortcut for resnet in _all(net, Resnet)
                                       if resnet.block.conv_shortcut is not None],
    "down- and upsampler": lambda net: [net.unet.down_blocks[0].downsample, net.unet.up_blocks[0].upsample],
    "group norms": lambda net: _all(net, nn.GroupNorm),
    "layer norms": lambda net: _all(net, nn.LayerNorm),
    "attention": lambda net: [block.attn1 for block in _transformers(net)],
    "feed-forward (GEGLU)": lambda net: [block.ff for block in _transformers(net)],
    "proj_in, proj_out": lambda net: [projection for attention in _all(net, Attention)
                                      for projection in (attention.block.proj_in, attention.block.proj_out)],
}
# What is fp32 in an autocast step anyway.
ALWAYS_FULL = ("operator", "schedule, level one's images", "level two's streams")


def arithmetic_shares(crop: int = 256) -> dict[str, float]:
    """Share of each ingredient in the products of a forward pass at full width, counted on tensors without data."""
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                 lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        net = IDM(num_steps=1)
        operator = BlockCompressedSensing(torch.empty(1024, 103), torch.arange(crop * crop), (crop, crop))
        y = operator.A(torch.empty(1, 1, crop, crop))
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            net(y, operator)
    names = {module: f"IDM.{name}" for name, module in net.named_modules()}
    counts = {module: sum(flops.values()) for module, flops in counter.get_flop_counts().items()}
    return {ingredient: sum(counts.get(names[module], 0) for module in modules(net)) / counts["Global"]
            for ingredient, modules in INGREDIENTS.items()}


@contextmanager
def replaced(modules: Iterable[nn.Module], make: Callable[[nn.Module], Callable]) -> Iterator[None]:
    """Let the forward of each module be make(module) for a while."""
    forwards = {module: make(module) for module in modules}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


@contextmanager
def autocast_alone(net: IDM, but: str | None = None) -> Iterator[None]:
    """In an autocast step: all in half that autocast would, the model's exceptions too, but for one ingredient."""
    full = set(INGREDIENTS[but](net)) if but else set()
    careful = set(_all(net, FullPrecisionConv2d))
    with replaced(careful - full, _plain), replaced(full - careful, _in_full):
        yield


@contextmanager
def half_alone(net: IDM, operator: LinearOperator, ingredient: str, half: torch.dtype) -> Iterator[LinearOperator]:
    """In an fp32 step: this ingredient in half.  Yields the operator to use."""
    with ExitStack() as stack:
        if ingredient == "operator":
            operator = HalfOperator(operator, half)
        elif ingredient == "schedule, level one's images":
            bodies = [coupling.body for coupling in net.steps]
            stack.enter_context(replaced(bodies, partial(_half_sampling_step, half=half)))
        elif ingredient == "level two's streams":
            stack.enter_context(replaced(_all(net.unet, WeightedCoupling), partial(_half_streams, half=half)))
        else:
            stack.enter_context(replaced(INGREDIENTS[ingredient](net), partial(_in_half, half=half)))
        yield operator


class HalfOperator(LinearOperator):
    """An operator in half precision between images and measurements in fp32."""

    def __init__(self, operator: LinearOperator, half: torch.dtype):
        super().__init__()
        self.operator, self.tight = deepcopy(operator).to(half), operator.tight

    def A(self, x: Tensor) -> Tensor:
        return self.operator.A(x).float()

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.operator.A_adjoint(y).float()


def _plain(module: nn.Module) -> Callable[..., Tensor]:
    return partial(nn.Conv2d.forward, module) if isinstance(module, FullPrecisionConv2d) else module.forward


def _in_full(module: nn.Module) -> Callable[..., Tensor]:
    forward = module.forward

    def in_full(x: Tensor, **options) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float(), **options)
    return in_full


def _in_half(module: nn.Module, half: torch.dtype) -> Callable[..., Tensor]:
    forward = _plain(module)

    def in_half(x: Tensor, **options) -> Tensor:
        with torch.autocast(x.device.type, half):
            return forward(x.to(half), **options).float()
    return in_half


def _half_sampling_step(step: nn.Module, half: torch.dtype) -> Callable[..., Tensor]:
    forward = step.forward

    def half_step(x: Tensor, unet, operator, y, back_projection, alpha_bar: Tensor, damping: Tensor, t: int) -> Tensor:
        inputs = unet, operator, y, back_projection, alpha_bar.to(half), damping
        return forward(x.to(half), *inputs, t).to(half).float()
    return half_step


def _half_streams(coupling: nn.Module, half: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    forward = coupling.forward
    return lambda x1, x2, *context: tuple(y.to(half).float() for y in forward(x1, x2, *context))
