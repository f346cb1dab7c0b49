"""The classical answers of benchmarks/operators.py where what they should say is known, and its table."""
import numpy as np
import pytest
import torch

from benchmarks.machine import END, START
from benchmarks.operators import bicubic, biharmonic, filtered_back_projection, total_variation, zero_filled
from benchmarks.operators_report import show
from model.operators import OPERATORS

RAMP = (torch.arange(32.0)[:, None] + 2 * torch.arange(32.0))[None, None] / 96


def drawn(name: str, **settings):
    return OPERATORS[name].random(image_shape=(32, 32), generator=torch.Generator().manual_seed(0), **settings)


def test_interpolation_gives_back_a_plane():
    for operator, answer in ((drawn("inpainting", keep=0.9, kind="box"), biharmonic),
                             (drawn("super_resolution", factor=2), bicubic)):
        inner = (answer(operator.A(RAMP), operator) - RAMP)[..., 4:-4, 4:-4]
        assert inner.abs().max() < 1e-3


def test_filtered_back_projection_of_a_disc():
    rows, columns = np.mgrid[:32, :32] - 15.5
    disc = torch.tensor(rows**2 + columns**2 < 100, dtype=torch.float32)[None, None]
    operator = drawn("ct", angles=60)
    found = filtered_back_projection(operator.A(disc), operator)[0, 0]
    assert found[10:22, 10:22].mean() == pytest.approx(1, abs=0.05) and found[:4].mean() == pytest.approx(0, abs=0.05)


def test_total_variation_removes_noise_and_leaves_a_constant():
    operator = drawn("cs", cs_ratio=1.0, block_size=8)
    generator = torch.Generator().manual_seed(1)
    constant = torch.full((1, 1, 32, 32), 0.5)
    assert (total_variation(operator.A(constant), operator, 0.1) - constant).abs().max() < 1e-3
    noisy = RAMP + 0.1 * torch.randn(RAMP.shape, generator=generator)
    assert (total_variation(operator.A(noisy), operator, 0.1) - RAMP).norm() < 0.5 * (noisy - RAMP).norm()


def test_zero_filling_is_the_adjoint():
    operator = drawn("mri", acceleration=2.0)
    y = operator.A(RAMP)
    assert torch.equal(zero_filled(y, operator), operator.A_adjoint(y))


def test_the_table(tmp_path, capsys):
    report = tmp_path / "report.md"
    report.write_text(f"before\n{START}\nstale\n{END}\nafter\n", encoding="utf-8")
    scores = {"compact": {"psnr": 30.004, "ssim": 0.9}, "classical": {"psnr": 29.0, "ssim": 0.8}}
    show({"scores": {"a task": scores}}, {"a task": ("Samples", "bicubic")}, report)
    text = report.read_text(encoding="utf-8")
    assert "| a task | Samples |  | 29.00 / 0.8000 (bicubic) |  | 30.00 / 0.9000 |  |" in text and "stale" not in text
    assert text.startswith("before\n") and text.endswith("after\n") and "a task" in capsys.readouterr().out
