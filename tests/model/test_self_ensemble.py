"""The eight orientations against numpy's own, and against what the mean of them must be."""
import numpy as np
import pytest
import torch

from model import BlockCompressedSensing, SelfEnsemble
from model.self_ensemble import OrientedOperator

# numpy's elements of the dihedral group, each with its inverse: transposition needs no turning to be told.
ORIENTATIONS = {
    (0, False): (lambda x: x, lambda x: x),
    (0, True): (np.fliplr, np.fliplr),
    (1, False): (lambda x: np.flipud(x.T), lambda x: np.flipud(x).T),
    (1, True): (lambda x: np.fliplr(np.flipud(x.T)), lambda x: np.fliplr(np.flipud(x)).T),
    (2, False): (lambda x: np.fliplr(np.flipud(x)), lambda x: np.fliplr(np.flipud(x))),
    (2, True): (np.flipud, np.flipud),
    (3, False): (lambda x: np.fliplr(x.T), lambda x: np.fliplr(x).T),
    (3, True): (lambda x: x.T, lambda x: x.T),
}


@pytest.fixture
def operator() -> BlockCompressedSensing:
    return BlockCompressedSensing.random((8, 12), 0.3, 4, torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_measurements_are_those_of_the_turned_image(operator, turns, mirrored):
    oriented, (turn, _) = OrientedOperator(operator, turns, mirrored), ORIENTATIONS[turns, mirrored]
    x = torch.randn(2, 1, 8, 12, dtype=torch.float64)
    turned = torch.from_numpy(np.stack([[turn(image)] for image in x[:, 0].numpy()]))
    y = operator.A(x)
    assert torch.equal(oriented.A(turned), y)
    assert torch.allclose((oriented.A_adjoint(y) * turned).sum(), (y * y).sum(), atol=1e-9)
    assert torch.allclose(oriented.A(oriented.A_adjoint(y)), y, atol=1e-6)  # A Aᵀ = I
    assert oriented.same_for_all


class Biased(torch.nn.Module):
    """The back-projection and a picture that does not turn with it, as a network's errors might not."""

    def forward(self, y, operator):
        back = operator.A_adjoint(y)
        height, width = back.shape[-2:]
        return back + torch.from_numpy(bias(height, width))


def bias(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).standard_normal((height, width))


def test_the_mean_is_over_all_orientations_each_turned_back(operator):
    y = operator.A(torch.randn(2, 1, 8, 12, dtype=torch.float64))
    expected = np.mean([back(bias(*((12, 8) if turns % 2 else (8, 12))))
                        for (turns, _), (_, back) in ORIENTATIONS.items()], axis=0)
    found = SelfEnsemble(Biased())(y, operator) - operator.A_adjoint(y)
    assert np.abs(found.numpy() - expected).max() < 1e-12
