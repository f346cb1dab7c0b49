"""What train.py makes of a batch and of its gradients, against the published training written out in NumPy."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from utils.distributed import Process
from utils.training.settings import Ratios
from utils.training.state import Progress

SIDE, BLOCK = 8, 4  # of crops, and of the operator's blocks


class Recorder(torch.nn.Module):
    """A network of one number, that answers with it and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))
        self.asked = []

    def forward(self, y, operator):
        self.asked.append((y, operator))
        return self.weight.expand(len(y), 1, SIDE, SIDE)


def make_run(net: Recorder, iteration: int = 0, **more) -> SimpleNamespace:
    args = SimpleNamespace(**{"seed": 2025, "cs_ratio": Ratios((1.0,)), "block_size": BLOCK, "patch_size": SIDE,
                              "precision": "fp32", "accumulate": 1, "batch_size": 2, "learning_rate": 1e-3,
                              "lr_schedule": "step", "warm_up": 0, "iters_per_epoch": 1, "epoch": 50, "clip": None,
                              "ema": None, **more})
    return SimpleNamespace(
        args=args, process=Process(0, 1, torch.device("cpu")), net=net, ema=None, batches=args.accumulate,
        optimizer=torch.optim.Adam(net.parameters(), lr=args.learning_rate, fused=True),
        scaler=torch.amp.GradScaler("cpu", enabled=False), progress=Progress(iteration=iteration),
        totals=torch.zeros(4, dtype=torch.float64))


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, SIDE, SIDE), dtype=np.uint8))


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0]).float()


def asked(pixels, matrix, iterations: int, slots: int = 1, **more) -> list[tuple]:
    net = Recorder()
    for iteration in range(iterations):
        for slot in range(slots):
            train.backward(make_run(net, iteration, **more), net, matrix, slot, pixels)
    return net.asked


def test_crops_come_in_all_eight_orientations(pixels, matrix):
    """At ratio 1 the measurements hold the whole crop."""
    crops = pixels.numpy()[:, 0] / 255
    orientations = [lambda x, k=k, t=t: np.rot90(x.T if t else x, k) for k in range(4) for t in (0, 1)]
    found = []
    for y, operator in asked(pixels, matrix, 100):
        shown = operator.A_adjoint(y)[:, 0].numpy()
        which = [i for i, turn in enumerate(orientations)
                 if np.allclose(shown, [turn(crop) for crop in crops], atol=1e-5)]
        assert len(which) == 1
        found += which
    assert set(found) == set(range(8))


def test_every_batch_has_a_permutation_of_its_own_and_the_matrix_of_its_slot(pixels, matrix):
    operators = [operator for _, operator in asked(pixels, matrix, 5, slots=2)]
    permutations = {tuple(operator.permutation.tolist()) for operator in operators}
    assert len(permutations) == 10 and all(sorted(each) == list(range(SIDE**2)) for each in permutations)
    assert all(operator.permutation.ndim == 1 for operator in operators)  # one serves the whole batch
    assert all(torch.equal(operator.sampling_matrix, matrix) for operator in operators)
    again = [operator for _, operator in asked(pixels, matrix, 5, slots=2)]
    assert all(torch.equal(a.permutation, b.permutation) for a, b in zip(operators, again, strict=True))


def test_the_ratio_of_a_batch_is_drawn_from_the_range(pixels, matrix):
    counts = [y.shape[-1] for y, _ in asked(pixels, matrix, 300, cs_ratio=Ratios((0.25, 0.75), is_range=True))]
    assert min(counts) == math.ceil(0.25 * 16 + 1e-9) and max(counts) == 12  # M = ceil(ratio · 16)
    assert all(20 < counts.count(m) < 60 for m in range(5, 13))  # each is expected 37 or 38 times


def test_the_loss_is_the_mean_absolute_error_and_its_gradient_that_of_the_batches_together(pixels, matrix):
    net = Recorder()
    run = make_run(net, accumulate=2)
    losses = [float(train.backward(run, net, matrix, slot, pixels)) for slot in range(2)]
    x = pixels.numpy() / 255
    assert losses == pytest.approx([np.abs(np.float32(0.3) - x).mean()] * 2, rel=1e-5)
    assert float(net.weight.grad) == pytest.approx(np.sign(np.float32(0.3) - x).mean(), rel=1e-5)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1e-3), (9, 1e-3), (10, 5e-4), (45, 6.25e-5)])
def test_an_update_moves_the_weights_by_the_published_learning_rate(epoch, rate):
    """Adam's first step is the learning rate, whatever the gradient."""
    net = Recorder()
    run = make_run(net, epoch)
    net.weight.grad = torch.tensor(-7.0)
    train.update(run, torch.tensor(0.5))
    assert float(net.weight.detach()) - 0.3 == pytest.approx(rate, rel=1e-3)
    assert run.progress.iteration == epoch + 1 and run.progress.crops == 2


def test_clipping_scales_all_gradients_to_the_norm(monkeypatch):
    net = Recorder()
    run = make_run(net, clip=0.5)
    seen = []
    monkeypatch.setattr(run.optimizer, "step", lambda *_, **__: seen.append(float(net.weight.grad)))
    net.weight.grad = torch.tensor(-7.0)
    assert float(train.update(run, torch.tensor(0.5))) == 7
    assert seen == [pytest.approx(-0.5)]
