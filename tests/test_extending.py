"""docs/extending.md as it stands: its files, its programs and its commands, on small pictures."""
import csv
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage
import torch

from model import IDM, WeightsError
from model.couplings import COUPLINGS
from model.operators import OPERATORS
from model.schedules import SCHEDULES
from utils.evaluation import METRICS

ROOT = Path(__file__).resolve().parents[1]
NAME = "grid_step_2_T_3"
SMALL = ["--width", "32", "--shuffle", "2", "--patch_size", "16", "--batch_size", "1", "--epoch", "1",
         "--iters_per_epoch", "2", "--testset_name", "Tiny", "--device", "cpu"]


@pytest.fixture
def registered():
    """What is registered in the meantime is forgotten afterwards."""
    known = [(each, dict(each)) for each in (COUPLINGS, SCHEDULES, OPERATORS, METRICS)]
    yield
    for each, before in known:
        each.clear()
        each.update(before)
    for name in [name for name in sys.modules if name.startswith("my_") or name == "test"]:
        del sys.modules[name]


@pytest.fixture
def run(tmp_path, monkeypatch, registered) -> Callable[..., None]:
    """Write the page's files beside pictures; run its command number 0 or 1 with further flags."""
    page = (ROOT / "docs" / "extending.md").read_text()
    files = re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", page, re.DOTALL)
    assert len(files) == page.count("```python") == 6
    for name, text in files:
        assert text.count("\n") < 40
        (tmp_path / name).write_text(text)
    shipped = Path(skimage.__file__).parent / "data"
    for folder, name in (("pristine_images", "coffee"), ("Tiny", "camera")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        picture = cv2.imread(str(shipped / f"{name}.png"))[100:131, 200:237]  # sides that the operator does not take
        cv2.imwrite(str(tmp_path / "data" / folder / f"{name}.png"), picture)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (commands,) = re.findall(r"```\n(python my.*?)```", page, re.DOTALL)
    commands = [shlex.split(line)[1:] for line in commands.splitlines()]

    def run(number: int, *more: str) -> None:
        monkeypatch.setattr(sys, "argv", [*commands[number], *more])
        runpy.run_path(commands[number][0], run_name="__main__")
    return run


def test_the_page_on_extending_runs_as_it_stands(run, tmp_path, capsys):
    """A run in two parts, and as a whole; what it leaves is loaded as what it is, and tested."""
    run(0, *SMALL, "--max_iters", "1")
    run(0, *SMALL)
    run(0, *SMALL, "--model_dir", "whole")
    net, whole = (IDM.from_checkpoint(tmp_path / folder / NAME) for folder in ("weight", "whole"))
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in net.state_dict().items())
    config = {"coupling": "rotation", "schedule": "geometric", "schedule_settings": {"start": 0.8}}
    assert {name: net.config[name] for name in config} == config
    start = float(net.schedule.logit.detach().sigmoid())
    assert 0 < abs(start - 0.8) < 1e-3  # two steps of Adam
    assert net.schedule(None)[0].tolist() == pytest.approx([start**t for t in range(4)])
    chains = [module for module in net.modules() if type(module).__name__ == "Rotation"]
    assert len(chains) == 3 + 15 + 22  # of the steps, the down blocks and the up blocks
    assert not any(name.endswith(".v") for name, _ in net.named_parameters())

    run(1, "--testset_name", "Tiny", "--device", "cpu")
    assert f"weight/{NAME}/pretrained" in (printed := capsys.readouterr().out) and "mean error" in printed
    (file,) = (tmp_path / "result" / "Tiny" / "grid_step_2").glob("camera_*.png")
    written, truth = (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(float)
                      for path in (file, tmp_path / "data" / "Tiny" / "camera.png"))
    with open(file.parent / "scores.csv") as table:
        (row,) = csv.DictReader(table)
    assert float(row["mae"]) == pytest.approx(np.abs(written - truth).mean(), abs=0.5)  # of a picture that is rounded

    with pytest.raises(SystemExit):
        run(0, *SMALL, "--coupling", "weighted")
    assert "coupling was rotation, is weighted" in capsys.readouterr().err
    del COUPLINGS["rotation"]
    with pytest.raises(WeightsError, match="coupling must be one of weighted, additive, not 'rotation'"):
        IDM.from_checkpoint(tmp_path / "weight" / NAME)


def test_the_reversible_gradients_of_a_coupling_of_ones_own_are_plain_autograds(run):
    runpy.run_path("my_coupling.py")
    torch.manual_seed(0)
    net = IDM.compact(32, num_steps=2, shuffle=2, coupling="rotation").double()
    operator = runpy.run_path("my_operator.py")["Grid"](2, 0, 1)
    y = operator.A(torch.rand(1, 1, 16, 16, dtype=torch.float64))
    gradients = {}
    for net.invertible in ("none", "both"):
        net.zero_grad()
        net(y, operator).square().sum().backward()
        gradients[net.invertible] = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    error = (gradients["both"] - gradients["none"]).norm() / gradients["none"].norm()
    assert float(gradients["none"].norm()) > 0 and float(error) < 1e-9
