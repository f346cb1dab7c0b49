"""Self-attention over the features, all of them or window by window, with a feed-forward (paper, section 3.2).

What is left of Stable Diffusion's transformer blocks without cross-attention.  Modules are named as diffusers names
them, so that weights keep their names; windows have no weights of their own, and weights of either kind serve both.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .feed_forward import FeedForward


class SelfAttention(nn.Module):
    """softmax(q kᵀ / √d) v of each head."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(sequences, tokens, channels) -> the same; mask: (sequences, 1, 1, tokens), false where none may look."""
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](x.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Self-attention, then a feed-forward, each with its norm and its residual."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A transformer block on the tokens of features, with its residual.

    Attributes:
        window: side of the windows, in tokens, within which tokens attend to each other; None: all to all.
    """

    def __init__(self, channels: int, heads: int, norm_groups: int, window: int | None = None):
        super().__init__()
        self.window = window
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, kernel_size=1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads)])
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> the same."""
        windows = Windows(*x.shape[-2:], self.window)
        tokens, mask = windows.split(self.proj_in(self.norm(x))), windows.mask(len(x), x.device)
        for block in self.transformer_blocks:
            tokens = block(tokens, mask)
        return x + self.proj_out(windows.join(tokens))


class Windows:
    """Cut features into windows, each a sequence of tokens, and put them together again.

    Where the windows do not divide the features, these are padded at the bottom and right, and the padding is masked.

    Args:
        height: of the features; width likewise.
        side: of the windows, in tokens; None, or more than a side of the features has: all of that side.
    """

    def __init__(self, height: int, width: int, side: int | None):
        self.height, self.width = height, width
        self.rows, self.columns = (min(side or length, length) for length in (height, width))  # of a window
        self.down, self.across = -(-height // self.rows), -(-width // self.columns)  # how many windows
        self.padding = (0, self.across * self.columns - width, 0, self.down * self.rows - height)

    def split(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch · windows, tokens of a window, channels)."""
        x = F.pad(x, self.padding) if any(self.padding) else x
        x = x.unflatten(3, (self.across, self.columns)).unflatten(2, (self.down, self.rows))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)

    def join(self, tokens: Tensor) -> Tensor:
        """The inverse of `split`."""
        x = tokens.view(-1, self.down, self.across, self.rows, self.columns, tokens.shape[-1])
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return x[..., :self.height, :self.width].contiguous()

    def mask(self, batch: int, device: torch.device) -> Tensor | None:
        """(batch · windows, 1, 1, tokens), false for the padding; None where there is none."""
        if not any(self.padding):
            return None
        inside = torch.ones(batch, 1, self.height, self.width, dtype=torch.bool, device=device)
        return self.split(inside).transpose(1, 2)[:, None]
