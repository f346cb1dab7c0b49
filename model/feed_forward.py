"""The feed-forward of a transformer block, made in parts where no gradient is asked for."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PART = 16384  # tokens: enough to fill a processor


class Geglu(nn.Module):
    """a · gelu(b), where (a, b) = proj(x)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        a, b = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))  # each in one piece
        return a * F.gelu(b)


class FeedForward(nn.Module):
    """GEGLU of four times the width, then a linear layer; over parts of the tokens in turn, as each stands for itself.

    It widens the features eightfold: made at once for a large picture, it is most of what an inference holds.
    """

    def __init__(self, channels: int):
        super().__init__()
        # The identity keeps the number 2, which the last layer has in Stable Diffusion's weights.
        self.net = nn.ModuleList([Geglu(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, features: Tensor) -> Tensor:
        """(sequences, tokens, channels) -> the same shape."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # autograd keeps all parts; a compiler fuses
            return self._layers(features)
        tokens = features.flatten(0, 1)
        parts = [self._layers(part) for part in tokens.split(PART)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view_as(features)

    def _layers(self, features: Tensor) -> Tensor:
        for layer in self.net:
            features = layer(features)
        return features
