"""Level one: the sampling chain around the U-Net, and the class IDM (paper, section 3.1)."""
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from . import checkpoint, compact_start, photograph
from .couplings import WeightedCoupling
from .operators import LinearOperator, PaddedOperator
from .reversible import ReversibleChain
from .schedules import LearnedSchedule
from .unet import UNet

INVERTIBLE = ("both", "sampling", "unet", "none")


class SamplingStep(nn.Module):
    """f_t: one step of measurement-consistent deterministic sampling, from x̂_t to x̂_{t−1}."""

    def forward(
        self,
        x: Tensor,  # x̂_t, (batch, 1, H, W)
        unet: UNet,
        operator: LinearOperator,
        y: Tensor,
        back_projection: Tensor,  # Aᵀy
        alpha_bar: Tensor,  # (T + 1,)
        step: int,  # t
    ) -> Tensor:
        now, after = alpha_bar[step], alpha_bar[step - 1]
        noise = unet(F.pixel_unshuffle(x, unet.shuffle), back_projection, operator, step)
        noise = F.pixel_shuffle(noise, unet.shuffle).to(x.dtype)
        x0 = (x - (1 - now).sqrt() * noise) / now.sqrt()
        x0 = x0 - operator.A_adjoint(operator.A(x0) - y)
        if step == 1:  # ᾱ_0 = 1: no noise is left, and √(1 − ᾱ_0) has no derivative
            return x0
        return after.sqrt() * x0 + (1 - after).sqrt() * noise


class IDM(ModelMixin, ConfigMixin):
    """Invertible diffusion model: recovers x from y = A x.

    Args:
        block_out_channels: widths of the U-Net's two scales; (320, 640) is Stable Diffusion's.
        num_steps: T, sampling steps.
        shuffle: s, where s×s pixels are folded into channels before the U-Net (published: 2).
        num_attention_heads: of every attention (published: 8).
        norm_groups: of every group norm (published: 32).

    Raises:
        ValueError: for widths that the group norms, the heads or the injectors do not allow.
    """

    _repeated_blocks = ("Resnet", "Attention")  # what diffusers' compile_repeated_blocks compiles

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, int] = (320, 640),
        num_steps: int = 3,
        shuffle: int = 2,
        num_attention_heads: int = 8,
        norm_groups: int = 32,
    ):
        super().__init__()
        _check_architecture(block_out_channels, num_steps, shuffle, num_attention_heads, norm_groups)
        self.unet = UNet(tuple(block_out_channels), num_steps, shuffle, num_attention_heads, norm_groups)
        self.schedule = LearnedSchedule(num_steps)
        self.input_scale = nn.Parameter(torch.ones(1))  # s_in
        self.merge_scale = nn.Parameter(torch.zeros(1))  # s_out
        self.steps = ReversibleChain(WeightedCoupling(SamplingStep()) for _ in range(num_steps))  # t = T, …, 1
        self.store_every = 1
        self.invertible = "both"

    @property
    def invertible(self) -> str:
        """Which levels run reversibly where gradients are asked for: "both", "sampling", "unet" or "none"."""
        return self._invertible

    @invertible.setter
    def invertible(self, levels: str) -> None:
        if levels not in INVERTIBLE:
            raise ValueError(f"invertible must be one of {', '.join(INVERTIBLE)}, not {levels!r}")
        self._invertible = levels
        self.unet.reversible = levels in ("both", "unet")

    @property
    def store_every(self) -> int | None:
        """Level one keeps its two images every so many steps (1: exact gradients), or never (None: as published)."""
        return self._store_every

    @store_every.setter
    def store_every(self, steps: int | None) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"store_every must be None or at least 1, not {steps}")
        self._store_every = steps

    @property
    def size_multiple(self) -> int:
        """Height and width of what the network computes on are multiples of this; other images are padded inside."""
        return 2 * self.config.shuffle

    def forward(
        self,
        y: Tensor,  # measurements, operator.A(x): (batch, H·W/N, M) of ours
        operator: LinearOperator,  # ours or deepinv's: a module with A and A_adjoint
    ) -> Tensor:
        """x̂, (batch, 1, H, W); not clamped.

        Raises:
            TypeError: where something that needs a gradient is hidden from the engine (see `ReversibleChain`).
        """
        back_projection = operator.A_adjoint(y)
        height, width = back_projection.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            operator = PaddedOperator(operator, (height, width), self.size_multiple)
            back_projection = operator.transform_adjoint(back_projection)
        alpha_bar = self.schedule()
        x = alpha_bar[-1].sqrt() * back_projection
        contexts = [(self.unet, operator, y, back_projection, alpha_bar, step)
                    for step in range(self.config.num_steps, 0, -1)]
        x, h = self.steps(x, self.input_scale * x, contexts, store_every=self.store_every,
                          keep_last=self.store_every is not None, reversible=self.invertible in ("both", "sampling"))
        return (x + self.merge_scale * h)[..., :height, :width]

    def reconstruct(
        self,
        image: np.ndarray,  # uint8, (H, W) or RGB (H, W, 3), of any size
        cs_ratio: float = 0.1,  # M / N, in (0, 1]
        block_size: int = 32,  # B; N = B²
        seed: int = 2025,  # of the sampling matrix and the permutation
    ) -> np.ndarray:
        """Measure a photograph's luminance and return what is recovered of it, uint8 and of the image's shape.

        Cr and Cb are the image's own, as in the paper's pictures.  Put the network into eval mode first.

        Raises:
            ValueError: for an image of another type or shape, or an impossible ratio.
        """
        return photograph.reconstruct(self, image, cs_ratio, block_size, seed)

    def to(self, *args, **kwargs) -> "IDM":
        """As of any module; diffusers' own warns of parts kept in float32, of which there are none here."""
        return nn.Module.to(self, *args, **kwargs)

    @classmethod
    def compact(cls, width: int = 64, num_steps: int = 3, shuffle: int = 4) -> "IDM":
        """Fresh weights at small widths (width, 2 · width), width // 32 attention heads.

        One group for every group norm: 32 groups of a few channels each would take the scale out of nearly every one.
        They start at about the back-projection, wired for images where the first scale has room for them (see
        `compact_start`).  v is 0.01 in all steps but the first, where it makes up for the step's greater noise level.

        Raises:
            ValueError: where the width is no multiple of 2 · shuffle².
        """
        if shuffle > 0 and width % (2 * shuffle**2):
            raise ValueError(f"the width must be a multiple of {2 * shuffle**2}")
        net = cls((width, 2 * width), num_steps, shuffle, num_attention_heads=max(1, width // 32), norm_groups=1)
        levels = compact_start.noise_levels(num_steps)
        with torch.no_grad():  # 1 + c_t² = 1 / ᾱ_t
            for alpha, before, level in zip(net.schedule.alpha, [0, *levels], levels, strict=False):
                alpha.fill_((1 + before**2) / (1 + level**2))
        for coupling in net.steps:
            nn.init.constant_(coupling.v, 0.01)
        if num_steps > 1:
            nn.init.constant_(net.steps[0].v, 1 - levels[-1] / levels[-2])
        compact_start.start(net.unet, levels)
        return net

    @classmethod
    def from_unet(cls, source: str | Path, num_steps: int = 3) -> "IDM":
        """Build on Stable Diffusion v1.5's U-Net; the rest keeps its initial values. See `checkpoint.build_on_unet`.

        Args:
            source: a hub id, a local diffusers folder (a pipeline or just its U-Net), or a one-file checkpoint.
            num_steps: T.
        """
        return checkpoint.build_on_unet(cls, source, num_steps)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "IDM":
        """Load a published checkpoint (.pkl), or a folder that `save_pretrained` wrote, or `train.py` did around it.

        Raises:
            WeightsError: where there is none, or it does not fit; then the message says what and where.
        """
        path = Path(path)
        folder = checkpoint.meant(path)
        if folder.is_dir():
            return checkpoint.read_pretrained(cls, folder, None if path.is_dir() else path)
        return checkpoint.build_official(cls, path)

    @property
    def fits_official_format(self) -> bool:
        """Whether heads and groups, of which the published format keeps no trace, are the published ones."""
        return (self.config.num_attention_heads == checkpoint.DEFAULT_HEADS
                and self.config.norm_groups == checkpoint.NORM_GROUPS)

    def official_state_dict(self) -> dict[str, Tensor]:
        """The published checkpoint format: every module of a chain under both of its names, sharing memory.

        Raises ValueError where the network does not fit the format.
        """
        if not self.fits_official_format:
            raise ValueError(f"the published format means {checkpoint.DEFAULT_HEADS} attention heads and "
                             f"{checkpoint.NORM_GROUPS} groups, not {self.config.num_attention_heads} and "
                             f"{self.config.norm_groups}; use save_pretrained")
        return {name: tensor.detach() for name, tensor in checkpoint.official_names(self)}


def _check_architecture(widths: tuple[int, int], num_steps: int, shuffle: int, heads: int, groups: int) -> None:
    if len(widths) != 2:
        raise ValueError(f"block_out_channels must be two widths, not {tuple(widths)}")
    if groups < 1 or heads < 1:
        raise ValueError(f"norm_groups and num_attention_heads must be at least 1, not {groups} and {heads}")
    for width in widths:
        if width < 1 or width % groups or width % heads:
            raise ValueError(f"widths must be multiples of the {groups} groups and of the {heads} heads, not {width}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    if shuffle < 1:
        raise ValueError(f"shuffle must be at least 1, not {shuffle}")
