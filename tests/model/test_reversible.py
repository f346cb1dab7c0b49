"""The reversible engine against plain autograd, in float64 where equality is asked for."""
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.couplings import AdditiveCoupling, WeightedCoupling
from model.reversible import ReversibleChain
from tests.conftest import DEVICES
from tests.model.chains import Body, loss_of, make_chain, make_contexts, relative, streams, used


@pytest.mark.parametrize("store_every", [None, 1, 2, 3, 7])
def test_gradients_equal_plain_autograd(store_every):
    chain = make_chain(5)
    contexts, extra = make_contexts()
    inputs = [*streams(), *extra, *used(chain)]
    gradients = []
    for reversible in (False, True):
        y = chain(*inputs[:2], contexts, reversible=reversible, store_every=store_every)
        gradients.append(torch.autograd.grad(loss_of(*y), inputs))
    assert len(inputs) == 2 + 4 + 5 * 3
    for plain, ours in zip(*gradients, strict=True):
        assert relative(ours, plain) <= 1e-9


def test_streams_kept_every_second_coupling_leave_nothing_to_be_rebuilt():
    """Of two streams each coupling makes one anew, so every stream is kept, however badly couplings invert."""
    chain, x = make_chain(6, dtype=torch.float32), streams(dtype=torch.float32)
    for coupling in chain:
        nn.init.constant_(coupling.v, 1e-4)
    inputs = [*x, *(p for name, p in chain.named_parameters() if "unused" not in name and not name.endswith("v"))]
    found = {store_every: torch.autograd.grad(loss_of(*chain(*x, store_every=store_every)), inputs)
             for store_every in (2, 3)}
    plain = torch.autograd.grad(loss_of(*chain(*x, reversible=False)), inputs)
    worst = {every: max(map(relative, ours, plain)) for every, ours in found.items()}
    assert worst[2] <= 1e-6 and worst[3] > 1e-4


class Affine(nn.Module):
    """y₁ = x₁ exp(s(x₂)) + c t(x₂), y₂ = x₂, with c from the context: only what a coupling must have."""

    def __init__(self, width: int):
        super().__init__()
        self.s, self.t = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x1: Tensor, x2: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return x1 * self.s(x2).tanh().exp() + self.t(x2) * sum(context), x2

    def inverse(self, y1: Tensor, y2: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return (y1 - self.t(y2) * sum(context)) * (-self.s(y2).tanh()).exp(), y2


class Swapped(Affine):
    """The same on the other stream, so that both change."""

    def forward(self, x1: Tensor, x2: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x2, x1, *context)[::-1]

    def inverse(self, y1: Tensor, y2: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return super().inverse(y2, y1, *context)[::-1]


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("store_every", [None, 1, 2])
def test_another_coupling_is_one_class(store_every, keep_last):
    """Couplings that the engine has never seen, mixed with ours, against plain autograd."""
    torch.manual_seed(0)
    chain = ReversibleChain([Affine(6), WeightedCoupling(Body(6)), Swapped(6), AdditiveCoupling(Body(6), Body(6)),
                             Swapped(6)]).double()
    c = torch.randn(1, dtype=torch.float64, requires_grad=True)
    contexts = [(c,), (c,), (c, c), ((c,), ()), (c,)]
    inputs = [*streams(), c, *used(chain)]
    with torch.no_grad():
        back = chain.inverse(*chain(*inputs[:2], contexts), contexts)
    assert max(relative(b, a) for a, b in zip(inputs[:2], back, strict=True)) <= 1e-12
    gradients = []
    for reversible in (False, True):
        y = chain(*inputs[:2], contexts, reversible=reversible, store_every=store_every, keep_last=keep_last)
        gradients.append(torch.autograd.grad(loss_of(*y), inputs))
    assert all(relative(ours, plain) <= 1e-9 for plain, ours in zip(*gradients, strict=True))


@pytest.mark.parametrize("context", ["one for both", "one for each"])
@pytest.mark.parametrize("half", [False, True])
def test_the_additive_coupling_equals_its_formulas(half, context):
    """y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁), or y₂ = x₂ without G; and its gradients against plain autograd's of these."""
    torch.manual_seed(0)
    f, g = Body(6).double(), Body(6).double()
    (x1, x2), c, d = streams(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.tensor(0.3).double()
    of_f, of_g = ((c,), (c,)) if context == "one for both" else ((c, 0.5), (d,))
    given = (c,) if context == "one for both" else (of_f,) if half else (of_f, of_g)
    y1 = x1 + f(x2, *of_f)
    expected = (y1, x2 if half else x2 + g(y1, *of_g))
    chain = ReversibleChain([AdditiveCoupling(f, None if half else g)])
    y = chain(x1, x2, [given])
    assert all(relative(ours, plain) <= 1e-12 for ours, plain in zip(y, expected, strict=True))
    assert all(relative(ours, x) <= 1e-12 for ours, x in zip(chain.inverse(*y, [given]), (x1, x2), strict=True))
    inputs = [x1, x2, c, *f.linear.parameters(), *(() if half else g.linear.parameters())]
    found = [torch.autograd.grad(loss_of(*each), inputs) for each in (y, expected)]
    assert all(relative(ours, plain) <= 1e-9 for ours, plain in zip(*found, strict=True))


def test_an_additive_coupling_with_too_many_contexts():
    coupling = AdditiveCoupling(nn.Identity())
    with pytest.raises(ValueError, match="one tuple for each of the 1, not 2 tuples"):
        coupling(*streams(), (), ())


class Nested(nn.Module):
    """A body that is a chain itself, as a sampling step is, and reads a context of its own in it."""

    def __init__(self, inner: ReversibleChain):
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        y1, y2 = self.inner(x, self.gain * x, [(shared, 2), (), (shared,)], reversible=not self.plain)
        return y1 + self.gain * y2

    plain = False


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("keep_last", [False, True])
def test_chains_within_a_chain(keep_last, offloaded):
    """Also where saved tensors come back as others, as those offloaded to the CPU do."""
    body = Nested(make_chain(3)).double()
    chain = ReversibleChain(WeightedCoupling(body) for _ in range(3)).double()  # one body in all, as there is one U-Net
    shared = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    inputs = [*streams(), shared, body.gain, *used(body.inner)]
    gradients = []
    for body.plain in (True, False):
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone())
        with hooks if offloaded else nullcontext():
            y = chain(*inputs[:2], [(shared,)] * 3, reversible=not body.plain, store_every=1, keep_last=keep_last)
        gradients.append(torch.autograd.grad(loss_of(*y), inputs))
    assert all(relative(ours, plain) <= 1e-9 for plain, ours in zip(*gradients, strict=True))


def test_the_last_coupling_is_computed_once_where_it_is_kept():
    chain, x, calls = make_chain(3), streams(), []
    for number, coupling in enumerate(chain):
        coupling.body.register_forward_hook(lambda module, args, out, number=number: calls.append(number))
    inputs = [*x, *used(chain)]
    plain = torch.autograd.grad(loss_of(*chain(*x, reversible=False)), inputs)
    calls.clear()
    loss = loss_of(*chain(*x, keep_last=True))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert calls == [0, 1, 2, 1, 0]
    second = torch.autograd.grad(loss, inputs)  # its graph is gone by now
    assert calls == [0, 1, 2, 1, 0, 2, 1, 0]
    for ours in (first, second):
        assert all(relative(a, b) <= 1e-9 for a, b in zip(ours, plain, strict=True))


def test_unused_parameters_get_no_gradient():
    chain = make_chain(2)
    loss_of(*chain(*streams())).backward()
    assert all((p.grad is None) == ("unused" in name) for name, p in chain.named_parameters())


def test_inverse_in_float64():
    chain, (contexts, _) = make_chain(5), make_contexts()
    x = streams()
    with torch.no_grad():
        back = chain.inverse(*chain(*x, contexts), contexts)
    assert max(relative(b, a) for a, b in zip(x, back, strict=True)) <= 1e-12


def test_nothing_is_kept_and_nothing_changes_without_gradients():
    chain, x = make_chain(3), streams()
    expected = chain(*x, reversible=False)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = chain(*x)
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(y, expected, strict=True))


@pytest.mark.parametrize(("store_every", "kept_streams"), [(None, 2), (1, 13), (4, 8)])
def test_what_is_kept(store_every, kept_streams):
    """12 couplings make 12 streams of two: all but the last are kept, two at every fourth and at the end, or two."""
    chain = make_chain(12, dtype=torch.float32)
    x = [stream.detach() for stream in streams(dtype=torch.float32)]
    parameters = {p.data_ptr() for p in chain.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chain(*x, store_every=store_every)
    assert sum(kept.values()) == kept_streams * x[0].numel()


def test_frozen_parameters():
    chain, reference = make_chain(4), make_chain(4)
    for module in (chain, reference):
        module[1].body.requires_grad_(False)
        module[2].v.requires_grad_(False)
    x = streams()
    loss_of(*chain(*x)).backward()
    loss_of(*reference(*x, reversible=False)).backward()
    for ours, plain in zip(chain.parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (plain.grad is None)
        assert ours.grad is None or relative(ours.grad, plain.grad) <= 1e-9
    chain.requires_grad_(False)  # all frozen: the streams alone still get their gradients
    (ours,) = torch.autograd.grad(loss_of(*chain(*x)), x[:1])
    (plain,) = torch.autograd.grad(loss_of(*chain(*x, reversible=False)), x[:1])
    assert relative(ours, plain) <= 1e-9


def test_inputs_without_gradient():
    chain, reference = make_chain(3), make_chain(3)
    x = [stream.detach() for stream in streams()]
    loss_of(*chain(*x)).backward()
    loss_of(*reference(*x, reversible=False)).backward()
    assert all(relative(a.grad, b.grad) <= 1e-9 for (name, a), b in
               zip(chain.named_parameters(), reference.parameters(), strict=True) if "unused" not in name)


def test_accumulation_and_retained_graph():
    """Two backward passes on one graph, and two graphs, add up as autograd adds them."""
    chain, x = make_chain(3), streams()
    weight = chain[0].body.linear.weight
    loss = loss_of(*chain(*x))
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    assert relative(weight.grad, 2 * once) <= 1e-12
    loss_of(*chain(*x)).backward()
    assert relative(weight.grad, 3 * once) <= 1e-12


def test_one_chain_used_twice_in_one_graph():
    chain, x = make_chain(3), streams()
    gradients = []
    for reversible in (False, True):
        y = chain(*chain(*x, reversible=reversible), reversible=reversible)
        gradients.append(torch.autograd.grad(loss_of(*y), [*x, chain[1].v, chain[1].body.linear.weight]))
    assert all(relative(b, a) <= 1e-9 for a, b in zip(*gradients, strict=True))


def test_hooks_run_once_on_the_full_gradient():
    """A hook on a parameter sees what autograd's own would: one call, with the sum over a shared body's uses."""
    body = Body(6).double()
    chain = ReversibleChain(WeightedCoupling(body) for _ in range(3)).double()
    calls = []
    body.linear.weight.register_hook(lambda grad: calls.append(grad.clone()))
    x = streams()
    loss_of(*chain(*x)).backward()
    loss_of(*chain(*x, reversible=False)).backward()
    ours, plain = calls
    assert relative(ours, plain) <= 1e-9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_restored_in_backward(dtype, keep_last, device):
    """Backward, called outside autocast, recomputes what forward computed: equal to plain autograd under autocast."""
    chain, seen = make_chain(4, dtype=torch.float32).to(device), []
    chain[0].body.linear.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x = [stream.detach().to(device).requires_grad_() for stream in streams(dtype=torch.float32)]
    inputs = [*x, chain[0].v, chain[0].body.linear.weight, chain[3].body.linear.weight]
    gradients = []
    for reversible in (False, True):
        with torch.autocast(device, dtype):
            y = chain(*x, reversible=reversible, store_every=1, keep_last=keep_last)
        assert y[0].dtype == y[1].dtype == torch.float32
        gradients.append(torch.autograd.grad(loss_of(*y), inputs))
    assert seen == [dtype] * 3  # plain forward, reversible forward, recomputation
    assert all(relative(b, a) <= 1e-6 for a, b in zip(*gradients, strict=True))


def test_changing_a_weight_between_forward_and_backward_is_an_error():
    chain = make_chain(2)
    loss = loss_of(*chain(*streams()))
    with torch.no_grad():
        chain[0].body.linear.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_a_frozen_weight_is_an_error_too():
    chain = make_chain(2)
    chain[0].body.requires_grad_(False)
    loss = loss_of(*chain(*streams()))
    chain[0].body.linear.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_weights_for_a_call_are_those_of_its_backward_too():
    """`torch.func.functional_call` puts them into the modules for forward alone; frozen ones count as well."""
    chain, x = make_chain(4), streams()
    torch.manual_seed(1)
    others = {name: (p + 0.1 * torch.randn_like(p)).detach() for name, p in chain.named_parameters()}
    learned = [other.requires_grad_() for name, other in others.items() if name.startswith(("1", "3")) and
               "unused" not in name]
    gradients = []
    for reversible in (False, True):
        y = torch.func.functional_call(chain, others, x, {"reversible": reversible})
        gradients.append(torch.autograd.grad(loss_of(*y), [*x, *learned]))
    assert all(relative(ours, plain) <= 1e-9 for plain, ours in zip(*gradients, strict=True))


def test_checkpointing_around_a_chain():
    chain, x = make_chain(3), streams()
    inputs = [*x, chain[0].v, chain[2].body.linear.weight]
    plain = torch.autograd.grad(loss_of(*chain(*x, reversible=False)), inputs)
    ours = torch.autograd.grad(loss_of(*checkpoint(chain, *x, use_reentrant=False)), inputs)
    assert all(relative(a, b) <= 1e-9 for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("v", [1, 0.5, 0.2, 0.1, 0.05, 0.01, 0])
def test_exact_at_every_v(v):
    chain, x = make_chain(8, dtype=torch.float32), streams(dtype=torch.float32)
    for coupling in chain:
        nn.init.constant_(coupling.v, v)
    inputs = [*x, *used(chain)]
    plain, ours = (torch.autograd.grad(loss_of(*chain(*x, reversible=reversible)), inputs)
                   for reversible in (False, True))
    assert all(relative(a, b) <= 1e-6 for a, b in zip(ours, plain, strict=True) if b.any() or a.any())


def test_inversion_that_cannot_be_exact_says_so():
    chain, x = make_chain(8, dtype=torch.float32), streams(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain(*x, store_every=None)
        for coupling in chain:
            nn.init.constant_(coupling.v, 0.05)
        chain(*x, store_every=1)
        chain(*x, store_every=2)
    with pytest.warns(UserWarning, match="product of 1/v exceeds what the precision bears"):
        chain(*x, store_every=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_chain(8)(*streams(), store_every=None)
    with pytest.warns(UserWarning, match="exceeds"), torch.autocast("cpu", torch.bfloat16):
        make_chain(8, dtype=torch.float32)(*x, store_every=None)  # v about 0.5, in half precision
    nn.init.zeros_(chain[3].v)
    with pytest.raises(ValueError, match="v = 0 has no inverse"):
        chain(*x, store_every=None)


def test_wrong_arguments():
    chain, x = make_chain(2), streams()
    with pytest.raises(ValueError, match="takes 2 contexts, not 1"):
        chain(*x, [()])
    with pytest.raises(TypeError, match="not a list"):
        chain(*x, [(), ([x[0]],)])
    with pytest.raises(ValueError, match="store_every must be None or at least 1"):
        chain(*x, store_every=0)
