"""What is computed twice is computed alike, or refused: against plain autograd, which computes it once."""
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from model.couplings import WeightedCoupling
from model.reversible import ReversibleChain, recomputed
from tests.model.chains import Body, loss_of, make_chain, make_contexts, relative, streams, used

WRONG = "computed something else in backward than in forward"


def chain_of(*bodies: nn.Module) -> ReversibleChain:
    return ReversibleChain(map(WeightedCoupling, bodies)).double()


def found(chain: ReversibleChain, inputs: list[Tensor], contexts=None, before_backward=lambda: None, **how):
    """Return the outputs and the gradients of all inputs, of which the first two are the streams."""
    y = chain(*inputs[:2], contexts, **how)
    before_backward()
    return y, torch.autograd.grad(loss_of(*y), inputs)


def assert_equal(ours: list[Tensor], plain: list[Tensor], bound: float = 1e-9) -> None:
    assert all(relative(a, b) <= bound for a, b in zip(ours, plain, strict=True))


# --- second derivatives ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("store_every", [1, 3])
def test_second_derivatives(store_every):
    """A gradient penalty, where the gradient that comes in needs none itself."""
    chain, (contexts, extra) = make_chain(5), make_contexts()
    inputs = [*streams(), *extra, *used(chain)]
    gradients = []
    for reversible in (False, True):
        y = chain(*inputs[:2], contexts, reversible=reversible, store_every=store_every, keep_last=1)
        first = torch.autograd.grad(y[0].sum(), inputs, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        gradients.append([*first, *torch.autograd.grad(penalty, inputs)])
    assert_equal(gradients[1], gradients[0])


def test_second_derivatives_do_not_pass_a_stream_twice():
    """The streams come from a parameter that the chain reads too: it counts once for each way."""
    chain, x = make_chain(3), streams()
    weight = chain[1].body.linear.weight
    gradients = []
    for reversible in (False, True):
        y = chain(x[0] @ weight, x[1], reversible=reversible)
        first = torch.autograd.grad(loss_of(*y), weight, create_graph=True)
        gradients.append([*first, *torch.autograd.grad(first[0].square().sum(), weight)])
    assert_equal(gradients[1], gradients[0])


def test_an_inverted_chain_has_no_second_derivatives():
    chain, x = make_chain(2), streams()
    with pytest.raises(RuntimeError, match="has no second derivatives; use store_every=1"):
        torch.autograd.grad(loss_of(*chain(*x, store_every=None)), x, create_graph=True)


class Descent(nn.Module):
    """One step down an energy that a chain computes, by `torch.autograd.grad`."""

    def __init__(self, reversible: bool):
        super().__init__()
        self.inner, self.reversible = make_chain(3), reversible

    def forward(self, x: Tensor) -> Tensor:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.inner(at, 0.5 * at, reversible=self.reversible)[0].square().sum()
            (slope,) = torch.autograd.grad(energy, at, create_graph=create_graph)
        return x - 0.1 * slope


@pytest.mark.parametrize("keep_last", [0, 1])
def test_a_body_that_differentiates_a_chain_itself(keep_last):
    gradients = []
    for reversible in (False, True):
        body = Descent(reversible)
        chain = chain_of(body, Body(6), body)
        torch.manual_seed(0)
        nn.init.normal_(chain[1].body.linear.weight)
        gradients.append(found(chain, [*streams(), *used(chain)], reversible=reversible, keep_last=keep_last)[1])
    assert_equal(gradients[1], gradients[0])


# --- threads --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("hooked", [False, True])
def test_a_thread_builds_a_graph_while_another_computes_one_again(hooked):
    chain, x = make_chain(3), streams()
    inputs = [*x, *used(chain)]
    if hooked:  # then a stand-in is in the module while it is computed again
        for parameter in used(chain):
            parameter.register_hook(lambda grad: None)
    plain = torch.autograd.grad(loss_of(*chain(*x, reversible=False)), inputs)
    inside, go_on, ours = threading.Event(), threading.Event(), {}

    def wait(*_) -> None:
        if torch.is_grad_enabled() and threading.current_thread() is thread and not inside.is_set():
            inside.set()
            go_on.wait(20)

    loss = loss_of(*chain(*x))
    thread = threading.Thread(target=lambda: ours.update(first=torch.autograd.grad(loss, inputs)))
    chain[1].body.linear.register_forward_pre_hook(wait)
    thread.start()
    assert inside.wait(20)
    other = loss_of(*chain(*x))
    penalty = chain[1].body.linear.weight.square().sum()  # of the parameter that the module has now
    go_on.set()
    ours["second"] = torch.autograd.grad(other, inputs)
    thread.join()
    assert_equal(ours["first"], plain)
    assert_equal(ours["second"], plain)
    (grad,) = torch.autograd.grad(penalty, chain[1].body.linear.weight)
    assert relative(grad, 2 * chain[1].body.linear.weight) <= 1e-12


def test_two_threads_compute_one_module_again_at_once():
    chain, x, both = make_chain(3), streams(), threading.Barrier(2, timeout=20)
    inputs, waited, ours = [*x, *used(chain)], set(), []
    plain = torch.autograd.grad(loss_of(*chain(*x, reversible=False)), inputs)

    def wait(*_) -> None:
        if torch.is_grad_enabled() and threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            both.wait()

    losses = [loss_of(*chain(*x)) for _ in range(2)]
    chain[2].body.linear.register_forward_pre_hook(wait)
    threads = [threading.Thread(target=lambda loss=loss: ours.append(torch.autograd.grad(loss, inputs)))
               for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ours) == 2
    for gradients in ours:
        assert_equal(gradients, plain)


def test_modules_keep_their_own_tensors_where_a_body_fails():
    chain, x = make_chain(2), streams()
    before = dict(chain.named_parameters())
    for parameter in before.values():
        parameter.register_hook(lambda grad: None)
    loss = loss_of(*chain(*x))

    def fail(*_) -> None:
        raise ArithmeticError

    chain[0].body.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        loss.backward()
    assert all(parameter is before[name] for name, parameter in chain.named_parameters())


# --- state ----------------------------------------------------------------------------------------------------------

STATEFUL = {
    "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.1)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh()),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh()),
    "spectral norm by hooks": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Tanh()),
}


@pytest.mark.parametrize("then_eval", [False, True])
@pytest.mark.parametrize("how", [{}, {"keep_last": 2}, {"store_every": 2}])
@pytest.mark.parametrize("kind", STATEFUL)
def test_bodies_with_a_state(kind, how, then_eval):
    """Two passes, one with gradients in between: outputs, gradients and buffers are plain autograd's."""
    results = []
    for reversible in (False, True):
        torch.manual_seed(0)
        shared = STATEFUL[kind]()
        chain = chain_of(shared, STATEFUL[kind](), shared, nn.Tanh())
        inputs = [*streams(), *used(chain)]
        if how.get("store_every") == 2 and reversible:  # what cannot be inverted is refused
            with pytest.raises(RuntimeError, match="draws random numbers or updates buffers, and cannot be inverted"):
                found(chain, inputs, **how)
            return
        for _ in range(2):
            y, gradients = found(chain, inputs, reversible=reversible, **how,
                                 before_backward=chain.eval if then_eval else lambda: None)
            chain.train()
            noise = torch.rand(3)  # goes on from where forward left it
        with torch.no_grad():
            y += chain.eval()(*inputs[:2])
        results.append([*y, *gradients, *(buffer.double() for buffer in chain.buffers()), noise])
    assert_equal(results[1], results[0])


def test_dropout_in_what_is_recomputed():
    torch.manual_seed(0)
    module, (x, _) = STATEFUL["dropout"]().double(), streams()
    gradients = []
    for compute in (module, lambda x: recomputed(module, x)):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(compute(x).square().sum(), [x, *module.parameters()]))
    assert_equal(gradients[1], gradients[0])


class Scaled(nn.Module):
    """x times a number among its attributes, or drawn from a generator of its own."""

    def __init__(self, draws: bool = False):
        super().__init__()
        self.factor, self.generator = 2.0, torch.Generator() if draws else None

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand((), generator=self.generator) if self.generator else self.factor)


def test_what_is_not_computed_alike_twice_is_refused():
    chain, x = chain_of(Body(6), Scaled(), Body(6)), streams()
    loss = loss_of(*chain(*x))
    chain[1].body.factor = 3.0
    with pytest.raises(RuntimeError, match=f"module 2 of the chain .* {WRONG}"):
        loss.backward()
    loss = loss_of(*chain(*x, keep_last=2))
    chain[1].body.factor = 2.0
    loss.backward()  # its graph was kept
    chain = chain_of(Body(6), Scaled(draws=True))
    with pytest.raises(RuntimeError, match=f"module 2 of the chain .* {WRONG}"):
        loss_of(*chain(*x)).backward()


def test_infinite_results_are_alike():
    """What overflows in half precision overflows twice; a gradient scaler then skips the step."""
    chain, x = make_chain(2, dtype=torch.float32), streams(dtype=torch.float32)
    nn.init.constant_(chain[0].body.linear.weight, torch.inf)
    loss_of(*chain(*x)).backward()
    assert chain[0].body.linear.weight.grad.isnan().any()


# --- gradients that would be lost -----------------------------------------------------------------------------------

class Reads(nn.Module):
    """x times what it finds in an attribute, or what a function gives."""

    def __init__(self, get):
        super().__init__()
        self.get = get

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get()


def test_a_tensor_that_hides_is_refused_where_it_needs_a_gradient():
    x, learned = streams(), torch.ones(6, dtype=torch.float64, requires_grad=True)
    for hidden in (learned, 2 * learned):
        for holder in (SimpleNamespace(w=[hidden]), SimpleNamespace(w=[{"a": hidden}])):
            item = holder.w[0]
            chain = chain_of(Body(6), Reads(lambda item=item: item["a"] if isinstance(item, dict) else item))
            with pytest.raises(TypeError, match=r"shape \(6,\) needs a gradient, which would be lost"):
                loss_of(*chain(*x)).backward()
            with pytest.raises(TypeError, match="needs a gradient, which would be lost"):
                loss_of(*chain(*x, keep_last=2)).backward()
            with pytest.raises(TypeError, match="needs a gradient, which would be lost"):
                loss_of(*chain(*x)).backward(create_graph=True)
    loss_of(*chain_of(Reads(learned.detach))(*x)).backward()


class Recurrent(nn.Module):
    """Reads its weights from a second list of them."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


def test_parameters_that_are_read_from_elsewhere():
    chain = chain_of(Recurrent(), Body(6))
    inputs = [*streams(), *used(chain)]
    plain, ours = (found(chain, inputs, reversible=reversible)[1] for reversible in (False, True))
    assert_equal(ours, plain)


def test_cached_parametrizations_are_refused():
    x, body = streams(), Body(6)
    parametrizations.orthogonal(body.linear)
    chain = chain_of(body, body)
    plain = found(chain, [*x, *used(chain)], reversible=False)[1]
    assert_equal(found(chain, [*x, *used(chain)])[1], plain)
    with parametrize.cached(), pytest.raises(TypeError, match="cached"):
        chain(*x)
    loss = loss_of(*chain(*x))
    with parametrize.cached(), pytest.raises(TypeError, match="cached"):
        loss.backward()
    with parametrize.cached():
        make_chain(2)(*x)  # nothing is parametrized here


# --- recomputed -----------------------------------------------------------------------------------------------------

def test_recomputed():
    torch.manual_seed(0)
    module, x, calls, kept = nn.Bilinear(6, 6, 6).double(), streams(), [], []
    module.register_forward_hook(lambda *_: calls.append(1))
    inputs = [*x, *module.parameters()]
    plain = torch.autograd.grad(module(*x).sin().sum(), inputs)
    calls.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = recomputed(module, *x)
    assert len(calls) == 1 and len(kept) == 2
    assert_equal(torch.autograd.grad(y.sin().sum(), inputs), plain)
    assert len(calls) == 2
    assert_equal(torch.autograd.grad(checkpoint(recomputed, module, *x, use_reentrant=False).sin().sum(), inputs),
                 plain)
