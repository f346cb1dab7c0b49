"""What an inference holds, counted on tensors without data: one pass of the U-Net, whatever came before."""
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention as diffusers_attention
from torch._subclasses import FakeTensorMode

from model import IDM, BlockCompressedSensing, feed_forward
from model.feed_forward import FeedForward
from model.memory import FollowTensors


def peak(num_steps: int, size: tuple[int, int], precision: torch.dtype | None = None) -> int:
    """The most bytes that live at once in a reconstruction with the compact network."""
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu", precision, enabled=precision is not None):
        net = IDM.compact(num_steps=num_steps)
        pixels = size[0] * size[1]
        operator = BlockCompressedSensing(torch.empty(1024, 103), torch.randperm(pixels), size)
        y = torch.empty(1, pixels // 1024, 103)
        with FollowTensors([*net.parameters(), *operator.buffers(), y]) as follow:
            net(y, operator)
        return follow.peak(without=[])


def test_steps_leave_nothing_but_their_images():
    height, width = 2048, 1376  # 2040×1356, padded
    image = 4 * height * width
    assert peak(6, (height, width)) - peak(2, (height, width)) <= 2 * image


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_large_picture_holds_some_feature_maps_and_never_places_by_places(precision):
    """Made at once, the feed-forward alone would hold 16 maps, and attention's weights more than 100 GB."""
    places, channels = (2048 // 4) * (1376 // 4), 64
    feature_map = 4 * places * channels
    assert peak(1, (2048, 1376), precision) < 19 * feature_map < 4 * places**2 / 100


def test_attention_runs_on_the_fused_kernel(monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention

    def noted(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    net = IDM((32, 64), num_steps=2).eval()
    operator = BlockCompressedSensing.random((16, 16), 0.5, 8, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        net(operator.A(torch.rand(1, 1, 16, 16)), operator)
    assert len(calls) == 2 * 10  # steps, attentions of a U-Net


@pytest.mark.parametrize("places, part", [(100, 7), (100, 50), (16, 100)])
def test_the_feed_forward_in_parts_is_diffusers(monkeypatch, places, part):
    monkeypatch.setattr(feed_forward, "PART", part)
    torch.manual_seed(0)
    whole, parts = diffusers_attention.FeedForward(16, activation_fn="geglu").double(), FeedForward(16).double()
    parts.load_state_dict(whole.state_dict())
    x = torch.randn(3, places, 16, dtype=torch.float64)
    assert torch.allclose(parts(x), whole(x), rtol=1e-13, atol=1e-14)  # with gradients, at once
    sizes = []
    parts.net[0].register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:-1].numel()))
    with torch.no_grad():
        assert torch.allclose(parts(x), whole(x), rtol=1e-13, atol=1e-14)
    assert max(sizes) <= part and sum(sizes) == 3 * places
