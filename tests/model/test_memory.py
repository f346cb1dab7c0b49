"""`invertible = "auto"`: what a step is counted to hold against what it holds, and what is chosen by it."""
import pytest
import torch

from model import IDM, BlockCompressedSensing, memory
from model.memory import FASTEST_FIRST, MARGIN, FollowTensors, choose, step_bytes

CPU = torch.device("cpu")


def network() -> IDM:
    torch.manual_seed(0)
    return IDM.compact(width=32, shuffle=2, attention=(False, True)).train()


def measured(batch: int, side: int) -> tuple[BlockCompressedSensing, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    operator = BlockCompressedSensing.random((side, side), 0.3, 16, generator)
    x = torch.rand(batch, 1, side, side, generator=generator)
    return operator, x, operator.A(x)


def step(net: IDM, operator: BlockCompressedSensing, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    net.zero_grad()
    (net(y, operator) - x).abs().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("levels", FASTEST_FIRST)
def test_what_is_counted_is_what_is_held(levels: str, half: torch.dtype | None):
    """Against the tensors of a step that is computed, with an operator whose measurements are not counted."""
    net, (operator, x, y) = network(), measured(3, 64)
    counted = step_bytes(net, (3, 1, 64, 64), levels, half=half)
    net.invertible = levels
    with (FollowTensors([*net.parameters(), *net.buffers(), *operator.buffers(), x, y]) as follow,
          torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None)):
        step(net, operator, x, y)
    held = follow.peak(without=[parameter.grad for parameter in net.parameters()])
    assert held / MARGIN < counted < 1.1 * held


@pytest.mark.parametrize("levels", ["sampling", "unet"])
def test_a_large_batch_is_counted_by_its_first_parts(levels: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model.idm.PIXELS_AT_ONCE", 16 * 16)  # one image of 32x32
    net = network()
    peaks = memory._peak(net, (5, 1, 32, 32), levels, CPU, None)
    assert step_bytes(net, (5, 1, 32, 32), levels) == pytest.approx(peaks, rel=0.02)


def test_the_fastest_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch):
    net, shape, counted = network(), (2, 1, 32, 32), dict(zip(FASTEST_FIRST, (4000, 3000, 2000, 1000), strict=True))
    monkeypatch.setattr(memory, "step_bytes", lambda net, shape, levels, *_: counted[levels])
    beside = 3 * sum(parameter.nbytes for parameter in net.parameters())  # gradients and Adam's averages
    needed = {levels: MARGIN * (beside + counted[levels]) for levels in FASTEST_FIRST}
    for free in sorted(needed.values()):
        for more in (-1, 1):
            fitting = [levels for levels in FASTEST_FIRST if needed[levels] <= free + more]
            assert choose(net, shape, CPU, free=int(free) + more).levels == (fitting or ["both"])[0]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert choose(net, shape, CPU, free=10**12).held == counted["none"]


def test_auto_has_the_gradients_of_what_it_chooses(monkeypatch: pytest.MonkeyPatch):
    net, (operator, x, y) = network(), measured(2, 32)
    monkeypatch.setattr(memory, "step_bytes", lambda net, shape, levels, *_: 10**6 if levels == "none" else 10**5)
    for free, levels in ((10**12, "none"), (1, "both"), (None, "both")):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        net.invertible = levels
        expected = step(net, operator, x, y)
        net.invertible = "auto"
        assert torch.equal(step(net, operator, x, y), expected) and net.levels == levels and net.invertible == "auto"


def test_where_memory_runs_out_all_the_same_less_is_held(monkeypatch: pytest.MonkeyPatch):
    net, (operator, x, y) = network(), measured(2, 32)
    net.invertible = "unet"
    expected, forward, tried = step(net, operator, x, y), type(net.unet).forward, []

    def exhausted(unet, *inputs):
        tried.append(net.levels)
        if net.levels in ("none", "sampling"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(unet, *inputs)

    monkeypatch.setattr(type(net.unet), "forward", exhausted)
    monkeypatch.setattr(memory, "step_bytes", lambda *_: 0)
    net.invertible = "auto"
    assert torch.equal(step(net, operator, x, y), expected)
    assert list(dict.fromkeys(tried)) == ["none", "sampling", "unet"]
    tried.clear()
    step(net, operator, x, y)  # remembers
    assert set(tried) == {"unet"}
    net.invertible = "none"
    with pytest.raises(torch.OutOfMemoryError):
        step(net, operator, x, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("levels", FASTEST_FIRST)
def test_what_is_counted_is_what_cudas_allocator_hands_out(levels: str):
    net, (operator, x, y) = network().cuda(), measured(4, 128)
    operator, x, y = operator.cuda(), x.cuda(), y.cuda()
    net.invertible = levels
    step(net, operator, x, y)
    net.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(net, operator, x, y)
    gradients = sum(parameter.nbytes for parameter in net.parameters())
    held = torch.cuda.max_memory_allocated() - before - gradients
    assert held < MARGIN * step_bytes(net, (4, 1, 128, 128), levels, "cuda")
