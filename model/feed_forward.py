"""The feed-forward of a transformer block, made in parts where no gradient is asked for."""
import torch
from torch import Tensor, nn

PART = 16384  # places: enough to fill a processor


class PartwiseFeedForward(nn.Module):
    """A feed-forward that treats every place by itself, over parts of the places in turn.

    It widens the features eightfold: made at once for a large picture, it is most of what an inference holds.

    Args:
        feed_forward: diffusers' FeedForward; its layers are taken over under their names.
    """

    def __init__(self, feed_forward: nn.Module):
        super().__init__()
        self.net = feed_forward.net

    def forward(self, features: Tensor) -> Tensor:
        """(batch, places, channels) -> the same shape."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # autograd keeps all parts; a compiler fuses
            return self._layers(features)
        parts = [self._layers(part) for part in features.split(max(1, PART // len(features)), dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _layers(self, features: Tensor) -> Tensor:
        for layer in self.net:
            features = layer(features)
        return features
