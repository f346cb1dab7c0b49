"""deepinv's physics in the network, and our operators as its physics, against dense matrices."""
import importlib.metadata
import importlib.util
import sys

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("deepinv") is None:
    pytest.skip("needs the package deepinv", allow_module_level=True)
if sys.platform == "linux" and torch.version.cuda is None and "+cpu" not in importlib.metadata.version("torchvision"):
    # deepinv imports torchvision, whose operators are compiled for CUDA and cannot be loaded beside a PyTorch for CPUs.
    # It wants to know of two, which nothing here calls.
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import deepinv  # noqa: E402
from deepinv import physics as phys  # noqa: E402

from model import IDM, LinearOperator, as_deepinv, check_operator  # noqa: E402
from model.operators import OPERATORS  # noqa: E402

PHYSICS = {  # (channels, H, W) of the images; sizes that the network has to pad among them
    "Inpainting": ((1, 13, 18), lambda size: phys.Inpainting(img_size=size, mask=0.5, rng=torch.manual_seed(0))),
    "Downsampling": ((1, 12, 16), lambda size: phys.Downsampling(img_size=size, factor=2, filter="bicubic")),
    "BlurFFT": ((1, 14, 17), lambda s: phys.BlurFFT(s, phys.functional.gaussian_blur(sigma=(0.5, 0.5)))),
    "MRI": ((2, 12, 16), lambda size: phys.MRI(mask=(torch.arange(16) % 3 == 0).expand(12, 16), img_size=size)),
    "Tomography": ((1, 12, 12), lambda size: phys.Tomography(angles=2, img_width=12, circle=False, normalize=True)),
    "SinglePixelCamera": ((1, 16, 16), lambda size: phys.SinglePixelCamera(m=60, img_size=size, fast=True)),
}


class Dense(LinearOperator):
    """y = M x with a matrix that was made by measuring one pixel after the other; A⁺ by its singular values."""

    def __init__(self, measure, size: tuple[int, int, int]):
        super().__init__()
        self.size = size
        pixels = torch.eye(size[0] * size[1] * size[2]).view(-1, *size)
        self.matrix = torch.cat([measure(pixel[None]).reshape(1, -1) for pixel in pixels]).T.double()
        self.inverse = torch.linalg.pinv(self.matrix, rtol=1e-4)

    def A(self, x: Tensor) -> Tensor:
        return (x.flatten(1).double() @ self.matrix.T).to(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return (y.double() @ self.matrix).to(y).view(-1, *self.size)

    def A_dagger(self, y: Tensor, damping: Tensor | None = None) -> Tensor:
        assert damping is None or not damping.any()
        return (y.double() @ self.inverse.T).to(y).view(-1, *self.size)


@pytest.mark.parametrize("name", PHYSICS)
def test_physics_go_in_as_they_are(name: str):
    """The reconstruction and its gradient, as with the dense matrix of the same physics."""
    size, build = PHYSICS[name]
    physics = build(size)
    check_operator(physics, size)
    torch.manual_seed(0)
    net = IDM((32, 64), shuffle=2, norm_groups=8, num_attention_heads=2, in_channels=size[0])
    parameters = [parameter for name, parameter in net.named_parameters() if name != "log_damping"]  # there is no noise
    x = torch.rand(2, *size)
    reference, y = Dense(physics.A, size), physics.A(x)
    assert torch.allclose(physics.A(x).flatten(1), reference.A(x), atol=1e-4)
    found = []
    for operator, measured in ((physics, y), (reference, y.flatten(1))):
        net.zero_grad(set_to_none=False)
        x_hat = net(measured, operator)
        assert x_hat.shape == x.shape
        (x_hat - x).square().mean().backward()
        found.append((x_hat.detach(), torch.cat([each.grad.flatten() for each in parameters])))
    (ours, gradient), (expected, expected_gradient) = found
    assert (ours - expected).norm() < 1e-3 * expected.norm()
    assert (gradient - expected_gradient).norm() < 1e-2 * expected_gradient.norm()


def test_a_reconstructor_of_deepinv():
    """Called as its networks are, in its own metric, and after its noise."""
    size, build = PHYSICS["Inpainting"]
    physics = build(size)
    physics.noise_model = phys.GaussianNoise(0.1)
    net, x = IDM((32, 64), norm_groups=8, num_attention_heads=2).eval(), torch.rand(1, *size)
    with torch.no_grad():
        x_hat = net(physics(x), physics)
    psnr = deepinv.metric.PSNR()(x_hat, x)
    assert float(psnr) == pytest.approx(float(-10 * (x_hat - x).square().mean().log10()), abs=1e-3)


@pytest.mark.parametrize(("name", "settings"), [
    ("inpainting", {}), ("super_resolution", {"factor": 2}), ("deblurring", {"sigma": 0.5}),
    ("cs", {"cs_ratio": 0.5, "block_size": 4})])
def test_ours_are_physics(name: str, settings: dict):
    operator = OPERATORS[name].random(image_shape=(12, 16), generator=torch.Generator().manual_seed(0), **settings)
    physics = as_deepinv(operator)
    x = torch.rand(2, 1, 12, 16)
    y = physics(x)
    dense = Dense(operator.A, (1, 12, 16))
    assert isinstance(physics, phys.LinearPhysics)
    assert torch.allclose(y.flatten(1), dense.A(x), atol=1e-5)
    assert torch.allclose(physics.A_adjoint(y), dense.A_adjoint(y.flatten(1)), atol=1e-5)
    assert torch.allclose(physics.A_dagger(y), dense.A_dagger(y.flatten(1)), atol=1e-2)
    assert abs(float(physics.adjointness_test(x))) < 1e-4
