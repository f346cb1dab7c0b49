"""Self-ensemble: the mean of what a network makes of an image in its eight orientations (Timofte, Rothe and Van Gool,
"Seven ways to improve example-based single image super resolution", CVPR 2016).

No new measurements are needed: A x = (A R⁻¹)(R x), so what A measures of x is what A R⁻¹ measures of the turned R x.
"""
from torch import Tensor, nn

from .operators import TransformedOperator


class OrientedOperator(TransformedOperator):
    """A R⁻¹: measures of a turned image what `operator`, A, measures of the image as it was.

    Args:
        operator: A.
        quarter_turns: how often R turns an image by 90 degrees, counter-clockwise,
        mirrored: and whether it then mirrors it, left to right.
    """

    def __init__(self, operator: nn.Module, quarter_turns: int, mirrored: bool):
        super().__init__(operator)
        self.quarter_turns, self.mirrored = quarter_turns, mirrored

    def transform(self, x: Tensor) -> Tensor:
        """R⁻¹ x: (..., H, W) -> the same, or (..., W, H)."""
        x = x.flip(-1) if self.mirrored else x
        return x.rot90(-self.quarter_turns, (-2, -1))

    def transform_adjoint(self, x: Tensor) -> Tensor:
        """R x."""
        x = x.rot90(self.quarter_turns, (-2, -1))
        return x.flip(-1) if self.mirrored else x


class SelfEnsemble(nn.Module):
    """A network's mean reconstruction over the eight orientations; eight times as slow as the network."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, y: Tensor, operator: nn.Module, noise_level: Tensor | None = None) -> Tensor:
        """x̂, (batch, 1, H, W), from y = operator.A(x), and the noise of y where the network takes it; not clamped."""
        told = {} if noise_level is None else {"noise_level": noise_level}
        oriented = [OrientedOperator(operator, turns, mirrored) for turns in range(4) for mirrored in (False, True)]
        return sum(each.transform(self.net(y, each, **told)) for each in oriented) / len(oriented)
