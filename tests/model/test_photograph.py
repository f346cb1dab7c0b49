"""Photographs through the network, against OpenCV's colours and the network's own output; and watching it at work."""
import cv2
import numpy as np
import pytest
import torch
from skimage import data
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import IDM, BlockCompressedSensing
from model.photograph import luminance, with_luminance
from model.unet import Attention, Resnet
from model.watch import watching
from tests.conftest import Golden


@pytest.fixture(scope="module")
def net() -> IDM:
    return Golden("narrow_T3").network().eval()


def test_luminance_is_opencvs_and_a_change_of_it_changes_nothing_else():
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 5, dtype=np.uint8)] * 3), -1).reshape(-1, 52, 3)  # colours
    image = np.concatenate([every, data.astronaut()[:100, :52]])
    assert np.array_equal(luminance(image), cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)[..., 0])
    assert np.array_equal(with_luminance(image, luminance(image).astype(np.float32)), image)
    photograph = data.astronaut() // 2 + 50  # far from black and white, where colours are cut off
    y = luminance(photograph) + np.random.default_rng(0).uniform(-20, 20, photograph.shape[:2]).astype(np.float32)
    found = cv2.cvtColor(with_luminance(photograph, y), cv2.COLOR_RGB2YCrCb).astype(int)
    before = cv2.cvtColor(photograph, cv2.COLOR_RGB2YCrCb).astype(int)
    assert np.abs(found[..., 0] - y).max() <= 1.5 and np.abs(found[..., 1:] - before[..., 1:]).max() <= 1
    y[0, 0] = np.nan
    assert with_luminance(luminance(photograph), y)[0, 0] == 0


@pytest.mark.parametrize("shape", [(64, 64), (37, 50, 3), (1, 1), (7, 90)])
def test_a_photograph_of_any_size_is_what_the_network_makes_of_its_measurements(net, shape):
    """Padded by hand to whole blocks of 16, which the network's own multiple, 4, divides."""
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    y = torch.from_numpy(luminance(image)).float() / 255
    height, width = y.shape
    padded = F.pad(y, (0, -width % 16, 0, -height % 16))[None, None]
    operator = BlockCompressedSensing.random(padded.shape[-2:], 0.3, 16, torch.Generator().manual_seed(3))
    with torch.no_grad():
        x_hat = net(operator.A(padded), operator)[0, 0, :height, :width]
    found = net.reconstruct(image, 0.3, block_size=16, seed=3)
    assert found.shape == image.shape and found.dtype == np.uint8
    expected = x_hat.clamp(0, 1).numpy() * 255
    if image.ndim == 2:
        assert np.array_equal(found, expected.round().astype(np.uint8))
    else:
        assert np.array_equal(found, with_luminance(image, expected))


def test_a_photograph_of_which_everything_is_measured_comes_back(net):
    """At ratio 1 data consistency alone decides, whatever the network; the end then adds s_out · h_0 and mixes h in."""
    exact = Golden("narrow_T3").network().eval()
    with torch.no_grad():
        exact.merge_scale.zero_()
        exact.steps[-1].v.zero_()
    image = data.coffee()[:40, :33]
    assert np.array_equal(exact.reconstruct(image, 1.0, block_size=8), image)


def test_other_images_are_refused(net):
    for image in (np.zeros((8, 8), np.float32), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8), np.uint8),
                  np.zeros(8, np.uint8), np.full((8, 8), np.nan), np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8), bool),
                  np.zeros((8, 8), np.uint16), None, [[0, 1]], torch.zeros(8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8 and"):
            net.reconstruct(image)
    with pytest.raises(ValueError, match="cs_ratio"):
        net.reconstruct(np.zeros((8, 8), np.uint8), 1.5)
    with pytest.raises(ValueError, match="block_size must be at least 1, not 0"):
        net.reconstruct(np.zeros((8, 8), np.uint8), block_size=0)


def test_an_image_that_is_a_view_of_another_is_as_good_as_a_copy(net):
    image = np.random.default_rng(0).integers(0, 256, (19, 22, 3), np.uint8)
    for view in (image[::-1, ::2], image[::-1, ::-1, 0], image[..., ::-1].transpose(1, 0, 2), image[..., 1].T):
        assert np.array_equal(net.reconstruct(view, 0.3, block_size=8),
                              net.reconstruct(view.copy(), 0.3, block_size=8))


def test_progress_is_the_share_of_multiplications_and_ends_at_one(net):
    """Those of each block as PyTorch's counter counts them, and those of attention itself, which it does not."""
    shares, estimates = [], []
    image = np.random.default_rng(0).integers(0, 256, (32, 48), np.uint8)
    with watching(net, shares.append, lambda step, x: estimates.append((step, x))):
        net.reconstruct(image, 0.25, block_size=16)
    assert len(shares) == 3 * 20 and shares == sorted(shares) and abs(shares[-1] - 1) < 1e-9
    assert abs(shares[19] - 1 / 3) < 1e-9  # after the first of three steps
    assert [step for step, _ in estimates] == [3, 2, 1]
    work, inputs = {}, {}
    hooks = [block.register_forward_pre_hook(lambda block, given: inputs.setdefault(block, given))
             for block in net.unet.modules() if isinstance(block, Resnet | Attention)]
    net.reconstruct(image, 0.25, block_size=16)
    for hook in hooks:
        hook.remove()
    for block, given in inputs.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block(*given)
        tokens = given[0].shape[-2] * given[0].shape[-1]
        work[block] = counter.get_total_flops() / 2
        work[block] += 2 * tokens**2 * given[0].shape[1] if isinstance(block, Attention) else 0
    expected = np.cumsum(list(work.values()) * 3) / sum(work.values()) / 3
    assert np.abs(expected - shares).max() < 0.01
    assert all(x.shape == (1, 1, 32, 48) for _, x in estimates)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_last_estimate_is_the_output_where_nothing_is_mixed_in(net):
    exact = Golden("narrow_T3").network().eval()
    with torch.no_grad():
        exact.merge_scale.zero_()
        for coupling in exact.steps:
            coupling.v.zero_()
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0))
    y = operator.A(torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
    estimates = []
    with torch.no_grad(), watching(exact, estimate=lambda step, x: estimates.append(x)):
        x_hat = exact(y, operator)
        assert torch.equal(estimates[-1], x_hat)
        alpha_bar = torch.cat((torch.ones(1), exact.schedule.alpha.cumprod(0)))[None]
        begun = alpha_bar[0, 2].sqrt() * estimates[0]  # x̂_2, from which two steps lead to the end
        for step in (2, 1):
            begun = exact.steps[3 - step].body(begun, exact.unet, operator, y, operator.A_adjoint(y), alpha_bar,
                                                      torch.zeros(1, 3), step)
        assert (begun - x_hat).abs().max() < 1e-5


def test_what_a_watcher_raises_ends_the_work(net):
    def stop(share):
        if share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watching(net, stop):
        net.reconstruct(np.zeros((16, 16), np.uint8), block_size=16)
    assert not any(module._forward_hooks for module in net.modules())
