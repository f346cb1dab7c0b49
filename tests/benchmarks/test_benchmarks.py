"""What the benchmarks count, against what can be told beforehand."""
import re
from contextlib import nullcontext
from pathlib import Path

import cv2
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks import redraw
from benchmarks.scaling import CountFlops
from model.memory import FollowTensors


@pytest.mark.parametrize("fake", [False, True])
def test_memory_is_that_of_the_tensors_that_live_at_once(fake):
    """Each exp keeps its result for backward: n of them, and while the last is differentiated two gradients."""
    n, kilobyte = 10, 1000
    def layers(x: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            x = x.exp()
        return x

    with FakeTensorMode() if fake else nullcontext():
        weight = torch.nn.Parameter(torch.zeros(250))
        with FollowTensors([weight]) as follow:
            layers(weight, n).sum().backward()
        assert n * kilobyte <= follow.peak(without=[weight.grad]) <= (n + 2) * kilobyte + 100
        weight.grad = None
        with FollowTensors([weight]) as follow:  # keeps one of each half, and the five of the half at hand
            half = checkpoint(layers, weight, 5, use_reentrant=False)
            checkpoint(layers, half, 5, use_reentrant=False).sum().backward()
        assert 6 * kilobyte <= follow.peak(without=[weight.grad]) <= 9 * kilobyte + 100


def test_operations_are_two_for_each_multiplication_and_addition():
    with FakeTensorMode():
        convolution = torch.nn.Conv2d(3, 5, 3, padding=1)
        x, q = torch.empty(2, 3, 16, 16), torch.empty(1, 4, 64, 8)
        with CountFlops() as forward:
            y = convolution(x)
        with CountFlops() as backward:
            y.sum().backward()  # with respect to the weight alone
        with CountFlops() as attention:
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
    expected = 2 * 2 * 16 * 16 * 5 * 3 * 9
    assert (forward.total, backward.total) == (expected, expected)
    assert attention.total == 2 * 2 * 4 * 64 * 64 * 8


def test_flags_that_name_files_know_what_a_tilde_means():
    """A shell leaves ~ as it is behind --flag=; file_path does not, where pathlib's Path does."""
    untyped = re.compile(r"type=Path\b|\"--(weights|out|\w+_dir|figure)\", default")
    scripts = Path(redraw.__file__).parent.glob("*.py")
    assert [script.name for script in scripts if untyped.search(script.read_text())] == []


def test_figures_are_drawn_from_what_is_in_the_repository(tmp_path):
    slow = {"teaser.png", "operators.png", "app.png", "report.png"}  # they reconstruct, and open a browser
    redraw.main(tmp_path, redraw.DRAWINGS.keys() - slow)
    drawn = {path.name: cv2.imread(str(path)) for path in tmp_path.iterdir()}
    assert len(drawn) == len(redraw.DRAWINGS) - len(slow)
    assert all(picture.std() > 10 for picture in drawn.values())
    assert {path.name for path in redraw.FIGURES.iterdir()} == set(redraw.DRAWINGS)
