"""What several tests share: the golden cases, numbers that the published code computed."""
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# Two test processes, or a test and its subprocesses, must not fight over few cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import screenshots  # noqa: E402
from model import IDM, BlockCompressedSensing  # noqa: E402
from model.checkpoint import load_official, official_names  # noqa: E402
from tests.golden.recipe import fill, probe  # noqa: E402
from utils.errors import UserError  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "golden"


@dataclass
class Golden:
    """One narrow network as the published code computes it (fp32, CPU)."""

    name: str

    def __post_init__(self):
        arrays = np.load(GOLDEN / f"{self.name}.npz")
        self.meta = json.loads(str(arrays["meta"]))
        self.names = [str(name) for name in arrays["names"]]  # parameters, each once
        self.keys = [str(key) for key in arrays["keys"]]  # of the published state_dict
        self.key_parameter = dict(zip(self.keys, (self.names[i] for i in arrays["key_param"]), strict=True))
        shapes = json.loads(str(arrays["shapes"]))
        self.shapes = shapes if isinstance(shapes, dict) else dict(zip(self.names, shapes, strict=True))
        self.x, self.y, self.x_hat, self.unet_in, self.unet_out = (
            torch.from_numpy(arrays[name]) for name in ("x", "y", "x_hat", "unet_in", "unet_out"))
        self.loss = float(arrays["loss"])
        self.grad_norm = dict(zip(self.names, arrays["grad_norm"], strict=True))
        self.grad_probe = dict(zip(self.names, arrays["grad_probe"], strict=True))
        self.sampling_matrix = torch.from_numpy(arrays["sampling_matrix"])
        self.permutation = torch.from_numpy(arrays["permutation"])

    def state_dict(self) -> dict[str, Tensor]:
        """The published state_dict of these weights."""
        seed = self.meta["weight_seed"]
        tensors = {name: torch.from_numpy(fill(name, tuple(self.shapes[name]), seed)) for name in self.names}
        return {key: tensors[name] for key, name in self.key_parameter.items()}

    def network(self) -> IDM:
        net = IDM(tuple(self.meta["block_out_channels"][:2]), self.meta["num_steps"])
        load_official(net, self.state_dict(), self.name)
        return net

    def operator(self) -> BlockCompressedSensing:
        return BlockCompressedSensing(self.sampling_matrix, self.permutation, tuple(self.x.shape[-2:]))

    def gradient_errors(self, net: IDM) -> dict[str, float]:
        """Relative errors of norm and probe of every gradient whose norm exceeds 1e-5."""
        errors = {}
        seen = set()
        for key, parameter in official_names(net):
            name = self.key_parameter[key]
            norm = self.grad_norm[name]
            if name in seen or norm <= 1e-5:
                continue
            seen.add(name)
            gradient = parameter.grad.double().cpu().numpy()
            errors[f"{name} (norm)"] = abs(np.linalg.norm(gradient) - norm) / norm
            # A probe has unit variance, so its product with the gradient is of the gradient's norm.
            expected = self.grad_probe[name]
            errors[f"{name} (probe)"] = abs((gradient * probe(name, gradient.shape)).sum() - expected) / norm
        return errors


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
torch.backends.cudnn.allow_tf32 = False  # the numbers compared with are fp32's


@pytest.fixture(params=["narrow_T3", "wide_T2_rect"])
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def browser():
    """A window of headless Chromium."""
    try:
        with screenshots.chromium((1280, 1200)) as window:
            yield window
    except UserError as error:
        pytest.skip(str(error))
