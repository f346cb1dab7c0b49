"""A large picture's convolutions over strips against diffusers' own blocks on the whole, in float64."""
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from model import IDM, BlockCompressedSensing, strips


def varied(module: nn.Module) -> nn.Module:
    """Every parameter another number, those of the norms too."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


@pytest.mark.parametrize("height", [1, 2, 5, 8])
@pytest.mark.parametrize("part", [1, 14, 10**6])  # tokens: strips of one row, of two, of all
@pytest.mark.parametrize(("groups", "out_channels", "skip_channels"), [(1, 4, 0), (2, 4, 4), (4, 8, 0)])
def test_resnet(monkeypatch, height, part, groups, out_channels, skip_channels):
    monkeypatch.setattr(strips, "PART", part)
    block = varied(ResnetBlock2D(in_channels=4 + skip_channels, out_channels=out_channels, temb_channels=None,
                                 groups=groups, eps=1e-5))
    x = 3 + 2 * torch.randn(2, 4, height, 7, dtype=torch.float64)
    skip = torch.randn(2, skip_channels, height, 7, dtype=torch.float64)
    features = (x, skip) if skip_channels else (x,)
    with torch.inference_mode():
        given = [each.clone() for each in features]
        torch.testing.assert_close(strips.resnet(block, *features), block(torch.cat(features, 1), None),
                                   rtol=1e-10, atol=1e-10)
    assert all(map(torch.equal, features, given))


@pytest.mark.parametrize("height", [1, 2, 5])
@pytest.mark.parametrize("part", [1, 14, 50, 10**6])
def test_upsample(monkeypatch, height, part):
    monkeypatch.setattr(strips, "PART", part)
    block = varied(Upsample2D(3, use_conv=True))
    x = torch.randn(2, 3, height, 7, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(strips.upsample(block, x), block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_network_on_a_large_picture(monkeypatch, half):
    net = IDM.compact(16, shuffle=2, attention=False).eval()
    operator = BlockCompressedSensing.random((64, 96), 0.25, 32, torch.Generator().manual_seed(1))
    y = operator.A(torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(2)))
    called = []

    def counted(*arguments):
        called.append(arguments)
        return resnet(*arguments)

    resnet = strips.resnet
    monkeypatch.setattr(strips, "resnet", counted)
    monkeypatch.setattr(strips, "PART", 100)
    with torch.autocast("cpu", half, enabled=half is not None):
        whole = net(y, operator)  # where gradients may be asked for, whatever the size
        monkeypatch.setattr(strips, "TOKENS", 1)
        assert torch.equal(net(y, operator), whole) and not called
        with torch.inference_mode():
            part = net(y, operator)
    assert called
    torch.testing.assert_close(part, whole, rtol=0, atol=2e-6 if half is None else 5e-3)
