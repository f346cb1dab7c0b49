"""LPIPS and FID by torchmetrics, for those who have it and the weights: it is imported, and they are looked for, only
where the metrics are asked for, and nothing is downloaded.

Both compare the Y channel, repeated for the three colours that their networks expect.
"""
import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.data.images import in_8_bits
from utils.errors import UserError, first_line
from utils.evaluation.metrics import Metric

if TYPE_CHECKING:
    import torch

PACKAGES = ("torchmetrics", "torchvision", "torch_fidelity")
WEIGHTS = {  # where PyTorch's hub keeps downloaded files, and what those who publish them call them
    "lpips": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "fid": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
}
LPIPS_LEAST_SIDE = 31  # pixels; of a smaller picture AlexNet's last layers see nothing


class Lpips(Metric):
    """Learned perceptual image patch similarity (Zhang et al., CVPR 2018) with AlexNet, version 0.1; lower is better.

    Raises UserError where packages or weights are missing.
    """

    label, higher_is_better = "LPIPS", False

    def __init__(self, device: "torch.device"):
        _weights("lpips")
        module = _package("torchmetrics.image.lpip")
        self.metric = module.LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device)
        self.device = device

    def __call__(self, truth: np.ndarray, reconstruction: np.ndarray) -> float:
        """Of uint8 luminance (H, W) and its float reconstruction in [0, 255]; nan where that holds one, or is tiny."""
        if min(truth.shape) < LPIPS_LEAST_SIDE or not np.isfinite(reconstruction).all():
            return math.nan
        pair = (_three_channels(picture).to(self.device) / 255 for picture in (truth, reconstruction))
        return float(self.metric.forward(*pair).detach())


class Fid(Metric):
    """Fréchet inception distance (Heusel et al., NIPS 2017) between the pictures of a set and their reconstructions.

    Lower is better. From few pictures it is far too high: compare only what the same set was measured with.
    Raises UserError where packages or weights are missing.
    """

    label, higher_is_better = "FID", False

    def __init__(self, device: "torch.device"):
        path = _weights("fid")
        module = _package("torchmetrics.image.fid")
        self.metric = module.FrechetInceptionDistance(feature_extractor_weights_path=str(path)).to(device)
        self.device = device

    def __call__(self, truth: np.ndarray, reconstruction: np.ndarray) -> None:
        """Take in a picture, uint8 (H, W), and its float reconstruction in [0, 255], rounded as it would be written."""
        for picture, real in ((truth, True), (in_8_bits(reconstruction), False)):
            self.metric.update(_three_channels(picture).to(self.device).byte(), real=real)

    def of_set(self, scores: list[float]) -> float:
        """Return the distance over all processes; nan for fewer than two pictures. What comes next is counted anew."""
        try:
            return float(self.metric.compute())
        except RuntimeError:  # more than one sample is required
            return math.nan
        finally:
            self.metric.reset()


def _three_channels(picture: np.ndarray) -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.ascontiguousarray(picture)).float().expand(1, 3, *picture.shape)


def _weights(metric: str) -> Path:
    import torch  # not at the top: programs that only list the metrics need no second more

    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS[metric].rpartition("/")[2]
    if not path.exists():
        raise UserError(f"--metrics {metric} needs weights that are not here: put {WEIGHTS[metric]} to {path}")
    return path


def _package(module: str):
    try:
        for package in PACKAGES:
            importlib.import_module(package)
        return importlib.import_module(module)
    except Exception as error:  # missing, or not fit for the PyTorch that is here
        raise UserError(f"--metrics needs packages that cannot be imported here ({first_line(error)}); try pip install "
                        "torchmetrics torchvision torch-fidelity") from error
