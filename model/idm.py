"""Level one: the sampling chain around the U-Net, and the class IDM (paper, section 3.1)."""
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from . import checkpoint, compact_start, memory, photograph, settings
from .couplings import Swapped
from .operators import LinearOperator, PaddedOperator, dagger, is_tight, warn_if_wrong
from .reversible import ReversibleChain
from .unet import Reversal, UNet

LOG_DAMPING = math.log(25.0)  # of λ/σ² before training with noise: x₀ is taken to be off by 0.2
INVERTIBLE = ("both", "sampling", "unet", "none")  # and "auto", which is one of them
PIXELS_AT_ONCE = 2**14  # of the features at the first scale, differentiated at once: enough to fill a GPU


class SamplingStep(nn.Module):
    """f_t: one step of measurement-consistent deterministic sampling, from x̂_t to x̂_{t−1}."""

    def forward(
        self,
        x: Tensor,  # x̂_t, (batch, 1, H, W)
        unet: UNet,
        operator: LinearOperator,
        y: Tensor,
        back_projection: Tensor,  # A⁺y
        alpha_bar: Tensor,  # (batch or 1, T + 1)
        damping: Tensor,  # λ_1, …, λ_T: (batch or 1, T)
        step: int,  # t
    ) -> Tensor:
        now, after = (alpha_bar[:, t].view(-1, 1, 1, 1) for t in (step, step - 1))
        noise = unet(F.pixel_unshuffle(x, unet.shuffle), back_projection, operator, step)
        noise = F.pixel_shuffle(noise, unet.shuffle).to(x.dtype)
        x0 = (x - (1 - now).sqrt() * noise) / now.sqrt()
        x0 = x0 - dagger(operator, operator.A(x0) - y, damping[:, step - 1])
        if step == 1:  # ᾱ_0 = 1: no noise is left, and √(1 − ᾱ_0) has no derivative
            return x0
        return after.sqrt() * x0 + (1 - after).sqrt() * noise


class SamplingUpdate(nn.Module):
    """F of "reversible noise injection", x̂_{t−1} = h_t + F(x̂_t): what f_t changes of x̂_t, at the noise level of h_t.

    F(x̂_t) = f_t(x̂_t) − √(ᾱ_{t+1} / ᾱ_t) x̂_t, for h_t = x̂_{t+1}; where the chain begins, h_t is of the level of x̂_t.
    """

    def __init__(self):
        super().__init__()
        self.step = SamplingStep()

    def forward(self, x: Tensor, unet: UNet, operator: LinearOperator, y: Tensor, back_projection: Tensor,
                alpha_bar: Tensor, damping: Tensor, step: int) -> Tensor:
        """As `SamplingStep`, with ᾱ up to the step where the chain begins."""
        before = min(step + 1, alpha_bar.shape[1] - 1)
        scale = (alpha_bar[:, before] / alpha_bar[:, step]).sqrt().view(-1, 1, 1, 1)
        return self.step(x, unet, operator, y, back_projection, alpha_bar, damping, step) - scale * x


def sampling_coupling(coupling: type[nn.Module]) -> nn.Module:
    """One step of the chain on (x̂_t, h_t); of a coupling of two bodies it is the first half alone."""
    if getattr(coupling, "bodies", 1) == 2:
        return Swapped(coupling(SamplingUpdate()))
    return coupling(SamplingStep())


class IDM(ModelMixin, ConfigMixin):
    """Invertible diffusion model: recovers x from y = A x.

    Args:
        block_out_channels: widths of the U-Net's two scales; (320, 640) is Stable Diffusion's.
        num_steps: T, sampling steps.
        shuffle: s, where s×s pixels are folded into channels before the U-Net (published: 2).
        num_attention_heads: of every attention (published: 8).
        norm_groups: of every group norm (published: 32).
        coupling: name in COUPLINGS, of the couplings of both levels (published: "weighted").
        schedule: name in SCHEDULES (published: "learned").
        schedule_settings: keyword arguments of the schedule, e.g. {"scale": 10.0} of "dynamic".
        attention: whether each of the two scales has attention (published: both); its injectors stay without it.
        attention_window: side, in tokens, of the windows within which attention works, for both scales or for each;
            None: all tokens attend to all (published).  It can be changed later: see the property.
        in_channels: of the images (published: 1; complex images have two, real and imaginary part).

    Raises:
        ValueError: for a name or a setting that is not known, and for widths that the group norms, the heads or the
            injectors do not allow.
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
        coupling: str = "weighted",
        schedule: str = "learned",
        schedule_settings: dict[str, Any] | None = None,
        attention: bool | tuple[bool, bool] = (True, True),
        attention_window: int | None | tuple[int | None, int | None] = None,
        in_channels: int = 1,
    ):
        super().__init__()
        coupling_class = settings.coupling_of(self.config)
        self.unet = UNet(*settings.scales(self.config))
        self.schedule = settings.schedule_of(self.config)
        self.input_scale = nn.Parameter(torch.ones(1))  # s_in
        self.merge_scale = nn.Parameter(torch.zeros(1))  # s_out
        self.log_damping = nn.Parameter(torch.full((num_steps,), LOG_DAMPING))  # log(λ_t/σ²), t = 1, …, T
        self.steps = ReversibleChain(sampling_coupling(coupling_class) for _ in range(num_steps))  # t = T, …, 1
        self.default_steps: int | None = None  # where the chain begins unless a call says so: fewer than T are faster
        self._store_every = 1
        self.invertible = "both"

    @property
    def schedule(self) -> nn.Module:
        """ᾱ from the back-projection; a property, as diffusers would find the name in the config first."""
        return self._modules["schedule"]

    @property
    def invertible(self) -> str:
        """Which levels run reversibly where gradients are asked for: "both", "sampling", "unet" or "none".

        "auto" is the fastest of these whose training step fits the memory that is free when images of a size are first
        differentiated (see memory.py), and one that holds less where a forward pass runs out of memory all the same.
        """
        return self._invertible

    @invertible.setter
    def invertible(self, levels: str) -> None:
        if levels not in (*INVERTIBLE, "auto"):
            raise ValueError(f"invertible must be one of {', '.join(INVERTIBLE)}, auto, not {levels!r}")
        self._invertible, self._chosen = levels, {}
        self._use("both" if levels == "auto" else levels)

    def _use(self, levels: str) -> None:
        self.levels = levels  # in use, where `invertible` may say "auto"
        self._set_reversal()

    def _choose(self, images: Tensor) -> tuple:
        """Use what "auto" means for such images; returns by what the choice is kept, for a leaner one to replace it."""
        device = images.device
        half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = images.shape, device, half
        if key not in self._chosen:
            self._chosen[key] = memory.choose(self, tuple(images.shape), device, half).levels
        self._use(self._chosen[key])
        return key

    @property
    def store_every(self) -> int | None:
        """Reversible levels keep the streams every so many couplings (1: exact), or never (None: as published)."""
        return self._store_every

    @store_every.setter
    def store_every(self, steps: int | None) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"store_every must be None or at least 1, not {steps}")
        self._store_every = steps
        self._set_reversal()

    def _set_reversal(self) -> None:
        # Where level one is reversible, one step's graph exists at a time: what stands between chains can stay in it.
        self.unet.reversal = Reversal(self.levels in ("both", "unet"), self.store_every,
                                      entries=self.levels == "unet")

    @property
    def attention_window(self) -> tuple[int | None, int | None]:
        """Side of attention's windows, in tokens, at each of the two scales; None: all tokens attend to all.

        Set it on any network, also on official weights, to make time and memory linear in the area of an image: one
        number for both scales, or two.  A token is `shuffle` pixels a side at the first scale, twice as many at the
        second.  It is part of the config that `save_pretrained` writes.

        Raises:
            ValueError: where a side is neither None nor at least 1.
        """
        return settings.window_pair(self.config.attention_window)

    @attention_window.setter
    def attention_window(self, window: int | None | tuple[int | None, int | None]) -> None:
        self.unet.set_attention_windows(*settings.window_pair(window))
        self.register_to_config(attention_window=window)

    @property
    def size_multiple(self) -> int:
        """Height and width of what the network computes on are multiples of this; other images are padded inside."""
        return 2 * self.config.shuffle

    def forward(
        self,
        y: Tensor,  # measurements, operator.A(x): (batch, H·W/N, M) of ours
        operator: LinearOperator,  # ours or deepinv's: a module with A and A_adjoint
        noise_level: float | Tensor | None = None,  # σ of the noise in y, of all images or (batch,); None: 0
        steps: int | None = None,  # begin the chain at step t = steps, from 1 to T; None: `default_steps`, or T
    ) -> Tensor:
        """x̂, (batch, in_channels, H, W); not clamped.

        Warns once of an operator that contradicts itself (see `check_operator`).

        Raises:
            ValueError: where `steps` is not from 1 to T, a noise level impossible, or the number of channels another.
            TypeError: where something that needs a gradient is hidden from the engine (see `ReversibleChain`).
        """
        sigma = self._noise_level(noise_level, len(y) if isinstance(y, Tensor) else len(y[0]))
        # Of an operator that is not tight A⁺ may enlarge noise without bound; images are believed to be about 1.
        back_projection = dagger(operator, y, None if sigma is None or is_tight(operator, y) else sigma.square())
        if back_projection.shape[1] != self.config.in_channels:
            raise ValueError(f"the operator measures images of {back_projection.shape[1]} channels, but the network is "
                             f"for {self.config.in_channels}: see its argument in_channels")
        warn_if_wrong(operator, back_projection)
        height, width = back_projection.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            operator = PaddedOperator(operator, (height, width), self.size_multiple)
            back_projection = operator.transform_adjoint(back_projection)
        last = steps if steps is not None else self.default_steps or self.config.num_steps
        if not 1 <= last <= self.config.num_steps:
            raise ValueError(f"steps must be from 1 to {self.config.num_steps}, not {last}")
        alpha_bar, damping = self.schedule(back_projection)[:, :last + 1], self._damping(sigma)
        x = self._with_what_fits(operator, (y, back_projection, alpha_bar, damping), last)[..., :height, :width]
        return x if last == self.config.num_steps else x + self._zero_of_all_parameters()

    def _with_what_fits(self, operator: LinearOperator, of_images: tuple[Tensor, ...], last: int) -> Tensor:
        """Run the chain; "auto" chooses how, and holds less where the device has not the memory that it seemed to."""
        auto = self.invertible == "auto" and torch.is_grad_enabled()
        key = self._choose(of_images[1]) if auto else None
        while True:
            try:
                parts = self._parts(operator, *of_images)
                return torch.cat([self._sample(operator, *part, last, keep_last=part is parts[-1]) for part in parts])
            except torch.OutOfMemoryError:
                if not auto or self.levels == "both":
                    raise
            self._use(memory.leaner(self.levels))  # out here nothing of what failed is alive
            self._chosen[key] = self.levels

    def images_at_once(self, height: int, width: int) -> int:
        """How many images of a batch are differentiated at a time where a level is reversible."""
        return max(1, PIXELS_AT_ONCE * self.config.shuffle**2 // (height * width))

    def _parts(self, operator: LinearOperator, y: Tensor, back_projection: Tensor, *of_images: Tensor
               ) -> list[tuple[Tensor, ...]]:
        """Take a batch apart into as many images at a time as fill a GPU, where it is differentiated reversibly.

        Backward then has the graphs of these alone.  The images must be measured alike.
        """
        tensors, (batch, _, height, width) = (y, back_projection, *of_images), back_projection.shape
        size = self.images_at_once(height, width)
        apart = getattr(operator, "same_for_all", False)  # another library's operator may hold something of each image
        if size >= batch or self.levels == "none" or not (apart and torch.is_grad_enabled()):
            return [tensors]
        return list(zip(*(each.expand(batch, *each.shape[1:]).split(size) for each in tensors), strict=True))

    def _sample(self, operator: LinearOperator, y: Tensor, back_projection: Tensor, alpha_bar: Tensor, damping: Tensor,
                last: int, keep_last: bool) -> Tensor:
        """Run the chain from step t = last; `keep_last`: keep the graph of its last step, which is computed once."""
        x = alpha_bar[:, last].sqrt().view(-1, 1, 1, 1) * back_projection
        contexts = [(self.unet, operator, y, back_projection, alpha_bar, damping, step) for step in range(last, 0, -1)]
        chain = self.steps if last == self.config.num_steps else self.steps[-last:]
        x, h = chain(x, self.input_scale * x, contexts, store_every=self.store_every,
                     keep_last=keep_last and self.store_every is not None,
                     reversible=self.levels in ("both", "sampling"))
        return x + self.merge_scale * h

    def _zero_of_all_parameters(self) -> Tensor:
        """0, with a gradient of 0 in every parameter: what fewer steps do not use has one all the same.

        DistributedDataParallel waits for the gradients of all, and an optimizer must not treat one process's step
        differently from another's.
        """
        return torch.cat([parameter.flatten()[:0] for parameter in self.parameters()]).sum()

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
            ValueError: for an image of another type or shape, or an impossible ratio or block size.
        """
        return photograph.reconstruct(self, image, cs_ratio, block_size, seed)

    def _noise_level(self, noise_level: float | Tensor | None, batch: int) -> Tensor | None:
        """σ, (batch or 1,), where it is given."""
        if noise_level is None:
            return None
        sigma = torch.as_tensor(noise_level, device=self.log_damping.device, dtype=self.log_damping.dtype).reshape(-1)
        if len(sigma) not in (1, batch) or not bool((sigma.isfinite() & (sigma >= 0)).all()):
            raise ValueError(f"noise_level must be at least 0, one number or one of each of the {batch} images, "
                             f"not {noise_level}")
        return sigma

    def _damping(self, sigma: Tensor | None) -> Tensor:
        """λ_t(σ) = exp(log_damping_t) σ², (batch or 1, T): the variance of y's noise by that of the error of x₀."""
        return (0 if sigma is None else sigma[:, None] ** 2) * self.log_damping.exp()[None]

    def to(self, *args, **kwargs) -> "IDM":
        """As of any module; diffusers' own warns of parts kept in float32, of which there are none here."""
        return nn.Module.to(self, *args, **kwargs)

    @classmethod
    def compact(cls, width: int = 64, num_steps: int = 3, shuffle: int = 4, **others: Any) -> "IDM":
        """Fresh weights at small widths (width, 2 · width), width // 32 attention heads.

        One group for every group norm: 32 groups of a few channels each would take the scale out of nearly every one.
        They start at about the back-projection, wired for images where the first scale has room for them (see
        `compact_start`).

        Args:
            others: further arguments of `IDM`.

        Raises:
            ValueError: where the width is no multiple of 2 · shuffle², and as `IDM` does.
        """
        if shuffle > 0 and width % (2 * shuffle**2):
            raise ValueError(f"the width must be a multiple of {2 * shuffle**2}")
        net = cls((width, 2 * width), num_steps, shuffle,
                  **{"num_attention_heads": max(1, width // 32), "norm_groups": 1, **others})
        compact_start.start(net)
        return net

    @classmethod
    def from_unet(cls, source: str | Path, num_steps: int = 3, **others: Any) -> "IDM":
        """Build on Stable Diffusion v1.5's U-Net; the rest keeps its initial values. See `checkpoint.build_on_unet`.

        Args:
            source: a hub id, a local diffusers folder (a pipeline or just its U-Net), or a one-file checkpoint.
            num_steps: T.
            others: further arguments of `IDM`.
        """
        return checkpoint.build_on_unet(cls, source, num_steps, **others)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Any:
        """As of any model of diffusers, but without asking for the library accelerate.

        Weights that are older than the damping get its initial values.
        """
        found = super().from_pretrained(*args, **{"low_cpu_mem_usage": False, **kwargs})
        net = found[0] if isinstance(found, tuple) else found  # with output_loading_info
        if net.log_damping.is_meta:
            net.log_damping = nn.Parameter(torch.empty_like(net.log_damping, device=net.merge_scale.device))
            net.reset_damping()
        return found

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

    def reset_damping(self) -> None:
        """Set λ_t(σ) to what it is before training with noise."""
        nn.init.constant_(self.log_damping, LOG_DAMPING)

    @property
    def _damping_is_initial(self) -> bool:
        initial = torch.full_like(self.log_damping, LOG_DAMPING)
        return self.log_damping.is_meta or torch.equal(self.log_damping, initial)

    @property
    def fits_official_format(self) -> bool:
        """Whether all of which the published format keeps no trace is as published: some settings, and the damping."""
        return not checkpoint.unofficial_settings(self.config) and self._damping_is_initial

    def official_state_dict(self) -> dict[str, Tensor]:
        """The published checkpoint format: every module of a chain under both of its names, sharing memory.

        Raises ValueError where the network does not fit the format.
        """
        if not self._damping_is_initial:
            raise ValueError("the published format has no damping, and this network's was trained with noise; "
                             "use save_pretrained")
        if others := checkpoint.unofficial_settings(self.config):
            raise ValueError(f"the published format means {others}; use save_pretrained")
        return {name: tensor.detach() for name, tensor in checkpoint.official_names(self)}
