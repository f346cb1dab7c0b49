"""LPIPS and FID: sentences where something is missing; where nothing is, what they must be by definition."""
import importlib
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.evaluation import perceptual
from utils.evaluation.perceptual import LPIPS_LEAST_SIDE, PACKAGES, WEIGHTS, Fid, Lpips

CPU = torch.device("cpu")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder where PyTorch's hub would keep its downloads; and nothing can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("name, metric", [("lpips", Lpips), ("fid", Fid)])
def test_missing_weights_say_where_to_put_them(hub, name, metric):
    with pytest.raises(UserError) as error:
        metric(CPU)
    assert WEIGHTS[name] in str(error.value)
    assert str(hub / WEIGHTS[name].split("/")[-1]) in str(error.value)


@pytest.mark.parametrize("name, metric", [("lpips", Lpips), ("fid", Fid)])
@pytest.mark.parametrize("package", PACKAGES)
def test_missing_packages_say_what_to_install(hub, monkeypatch, name, metric, package):
    (hub / WEIGHTS[name].split("/")[-1]).touch()
    for other in PACKAGES:
        monkeypatch.setitem(sys.modules, other, torch)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install torchmetrics torchvision torch-fidelity"):
        metric(CPU)


def test_fid_takes_in_both_pictures_the_second_as_it_would_be_written(hub, monkeypatch):
    seen = []

    class Distance:
        def __init__(self, feature_extractor_weights_path):
            assert feature_extractor_weights_path == str(hub / WEIGHTS["fid"].split("/")[-1])

        def to(self, device):
            return self

        def update(self, pictures, real):
            seen.append((pictures, real))

        def compute(self):
            return torch.tensor(12.5)

        def reset(self):
            seen.clear()

    (hub / WEIGHTS["fid"].split("/")[-1]).touch()
    monkeypatch.setattr(perceptual, "_package", lambda name: SimpleNamespace(FrechetInceptionDistance=Distance))
    fid = Fid(CPU)
    fid(np.array([[0, 7], [255, 9]], np.uint8), np.array([[-3.0, 7.6], [300.0, np.nan]], np.float32))
    (truth, real), (found, made) = seen
    assert real and not made and truth.dtype == found.dtype == torch.uint8
    assert truth[0].tolist() == [[[0, 7], [255, 9]]] * 3 and found[0].tolist() == [[[0, 8], [255, 0]]] * 3
    assert fid.of_set([]) == 12.5 and not seen


def test_lpips_of_equal_pictures_is_zero(hub):
    try:
        _, torchvision, _ = map(importlib.import_module, PACKAGES)
    except Exception as error:  # missing, or not fit for this PyTorch
        pytest.skip(f"needs {', '.join(PACKAGES)}: {error}")
    torch.manual_seed(0)
    weights = torchvision.models.alexnet(weights=None).state_dict()
    torch.save(weights, hub / WEIGHTS["lpips"].split("/")[-1])
    lpips = Lpips(CPU)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (LPIPS_LEAST_SIDE, 40), dtype=np.uint8)
    same = picture.astype(np.float32)
    little, much = (lpips(picture, np.clip(same + rng.normal(0, sigma, same.shape), 0, 255)) for sigma in (5, 50))
    assert lpips(picture, same) == 0 < little < much
    assert math.isnan(lpips(picture[1:], same[1:]))
    assert math.isnan(lpips(picture, np.where(same > 250, np.nan, same)))
