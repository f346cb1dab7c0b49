"""The DDPM's loss, loading and saving, and DDNM on grey and colour networks and on sides that a network cannot take."""
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from baselines.ddnm import Sampling
from baselines.ddpm import DDNM, ChannelMean, load_ddpm, noise_loss, schedule, small_unet
from model import BlockCompressedSensing
from utils.errors import UserError


def tiny(channels: int = 1, out_channels: int | None = None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(in_channels=channels, out_channels=out_channels or channels, layers_per_block=1,
                       block_out_channels=(8, 8, 8), down_block_types=("DownBlock2D",) * 3,
                       up_block_types=("UpBlock2D",) * 3, norm_num_groups=4, add_attention=False)


def measured(height: int = 16, width: int = 12):
    """An operator and what it measures of two random images."""
    generator = torch.Generator().manual_seed(1)
    operator = BlockCompressedSensing.random((height, width), 0.25, 4, generator)
    return operator, operator.A(torch.rand(2, 1, height, width, generator=generator))


def test_loss_is_nought_for_a_network_that_knows_the_picture_and_one_for_zeros():
    """The noise by hand from ᾱ, the product of 1 − β with β linear from 1e-4 to 0.02."""
    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    x = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = []

    class Output:
        def __init__(self, sample):
            self.sample = sample

    def knowing(noisy, t):
        seen.append(t)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return Output(((noisy - a.sqrt() * (2 * x - 1)) / (1 - a).sqrt()).float())

    assert noise_loss(knowing, schedule(), x, torch.Generator().manual_seed(0)) < 1e-6
    parts = torch.arange(64) * 1000 / 64
    assert (seen[0] >= parts.floor()).all() and (seen[0] < parts + 1000 / 64).all()  # one t from each of equal parts
    zeros = noise_loss(lambda noisy, t: Output(torch.zeros_like(noisy)), schedule(), x, torch.Generator())
    assert float(zeros) == pytest.approx(1, abs=6 * (2 / x.numel()) ** 0.5)  # the mean of that many squares of N(0, 1)


def test_a_colour_network_serves_grey_measurements_by_the_mean_of_its_channels():
    operator, y = measured()
    mean = ChannelMean(operator, 3)
    basis = torch.eye(3 * 16 * 12).view(-1, 3, 16, 12)
    matrix = mean.A(basis).flatten(1).T
    np.testing.assert_allclose(mean.A_adjoint(y).flatten(1), y.flatten(1) @ matrix, atol=1e-5)
    np.testing.assert_allclose(mean.A_dagger(y).flatten(1), y.flatten(1) @ torch.linalg.pinv(matrix).T, atol=1e-5)
    x_hat = DDNM(tiny(3), schedule(), Sampling(4))(y, operator)
    assert x_hat.shape == (2, 1, 16, 12)
    np.testing.assert_allclose(operator.A(x_hat), y, atol=1e-4)


def test_a_reconstruction_depends_on_its_measurement_and_the_seed_alone():
    operator, y = measured()
    net = DDNM(tiny(), schedule(), Sampling(4), seed=5)
    both = net(y, operator)
    np.testing.assert_allclose(both[1:], net(y[1:], operator), atol=1e-5)
    other = DDNM(tiny(), schedule(), Sampling(4), seed=6)(y, operator)
    assert (both - other).abs().max() > 0.01
    np.testing.assert_allclose(operator.A(other), y, atol=1e-4)


def test_what_is_known_of_the_noise_at_the_call_counts():
    operator, y = measured()
    by_setting = DDNM(tiny(), schedule(), Sampling(4, noise_level=0.1))(y, operator)
    at_call = DDNM(tiny(), schedule(), Sampling(4))(y, operator, noise_level=0.1)
    assert torch.equal(by_setting, at_call)
    each = DDNM(tiny(), schedule(), Sampling(4))(y, operator, noise_level=torch.tensor([0.1, 0.0]))
    np.testing.assert_allclose(each[:1], at_call[:1], atol=1e-6)
    np.testing.assert_allclose(operator.A(each)[1:], y[1:], atol=1e-4)
    assert (operator.A(at_call) - y).abs().max() > 0.01  # y is not copied, noise and all


def test_sides_that_the_network_cannot_take_are_padded_by_reflection():
    net = DDNM(tiny(1, out_channels=2), schedule(), Sampling(4))  # the second: a learned variance
    x = torch.randn(1, 1, 13, 22, generator=torch.Generator().manual_seed(0))
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, 3), (0, 2)), mode="reflect"))
    with torch.no_grad():
        expected = net.unet(padded, 6).sample[:, :1, :13, :22]
        np.testing.assert_allclose(net.estimate_noise(x, 7), expected, atol=1e-6)


def test_pipelines_are_loaded_in_fp32_from_what_diffusers_writes(tmp_path):
    unet = tiny()
    DDPMPipeline(unet.half(), schedule()).save_pretrained(tmp_path / "ddpm")
    loaded, scheduler = load_ddpm(tmp_path / "ddpm")
    assert loaded.dtype == torch.float32 and scheduler.config.beta_end == 0.02
    for saved, now in zip(unet.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(saved.float(), now)


def test_a_flag_may_name_a_pipeline_of_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(DDPMPipeline, "from_pretrained",
                        lambda source, **_: asked.append(source) or DDPMPipeline(tiny(), schedule()))
    load_ddpm(Path("google/ddpm-celebahq-256"))
    assert asked == ["google/ddpm-celebahq-256"]


def test_what_ddnm_cannot_use_is_answered_by_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load a DDPM from .*empty.*name a folder or a hub id"):
        load_ddpm(tmp_path / "empty")
    with pytest.raises(UserError, match="4 channels"):
        DDNM(tiny(4), schedule(), Sampling())
    with pytest.raises(UserError, match="estimates v_prediction"):
        DDNM(tiny(), DDPMScheduler(prediction_type="v_prediction"), Sampling())
    with pytest.raises(UserError, match="has 1000 steps"):
        DDNM(tiny(), schedule(), Sampling(1001))


def test_the_small_network_takes_any_size_and_fits_six_megabytes_in_half_precision():
    assert sum(parameter.numel() * 2 for parameter in small_unet().parameters()) < 6e6
