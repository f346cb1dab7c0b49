"""An unconditional pixel-space DDPM of diffusers' own parts (Ho et al., 2020), and DDNM with it as a reconstructor."""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from torch import Tensor, nn

from baselines.ddnm import Sampling, ddnm
from utils.errors import UserError, first_line

CHANNELS = (1, 3)  # of networks that DDNM takes
NORM_GROUPS = 8


def small_unet(block_out_channels: tuple[int, ...] = (16, 32, 64, 128)) -> UNet2DModel:
    """Return a fresh noise estimator for grey pictures: 2.4 M parameters, convolutions alone, so of any size."""
    scales = len(block_out_channels)
    return UNet2DModel(in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=block_out_channels,
                       down_block_types=("DownBlock2D",) * scales, up_block_types=("UpBlock2D",) * scales,
                       norm_num_groups=NORM_GROUPS, add_attention=False)


def schedule() -> DDPMScheduler:
    """Return the published schedule: beta linear from 1e-4 to 0.02 over 1000 steps."""
    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def noise_loss(
    net: nn.Module,  # a UNet2DModel, or DistributedDataParallel around it
    scheduler: DDPMScheduler,
    x: Tensor,  # (batch, 1, P, P) in [0, 1]
    generator: torch.Generator,  # on the CPU, so that every device draws the same
) -> Tensor:
    """Return mean |ε − net(√ᾱ_t x + √(1 − ᾱ_t) ε, t)|², x scaled to [-1, 1].

    One t is drawn from each of `batch` equal parts of the steps: uniform as published, with less variance of the mean.
    """
    batch, steps = len(x), scheduler.config.num_train_timesteps
    parts = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    t = (parts * steps).long().clamp(max=steps - 1).to(x.device)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    noisy = scheduler.add_noise(2 * x - 1, noise, t)
    return (net(noisy, t).sample - noise).square().mean()


class DDNM(nn.Module):
    """Reconstruct from measurements with an unconditional DDPM: called as IDM is, (y, operator) -> x̂.

    Where the operator measures grey images and the network is one for colour, the chain is in colour, and what is
    measured is the mean of its three channels (A⁺y is replicated): the result is that mean.

    Args:
        unet: the noise estimator, of 1 or 3 channels; a learned variance behind them is ignored.
        scheduler: with the ᾱ's that it was trained with.
        sampling: steps, η, time travel, noise.
        seed: of all that is drawn. Every image of a batch gets the same numbers, which depend on seed and size alone.

    Raises:
        UserError: for a network or scheduler that DDNM cannot use.
    """

    size_multiple = 1  # `estimate_noise` pads

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler, sampling: Sampling, seed: int = 2025):
        super().__init__()
        if unet.config.in_channels not in CHANNELS:
            raise UserError(f"the DDPM's network is for {unet.config.in_channels} channels; DDNM needs one for 1 or 3")
        if scheduler.config.prediction_type != "epsilon":
            raise UserError(f"the DDPM estimates {scheduler.config.prediction_type}; DDNM needs one that estimates the "
                            "noise (prediction_type epsilon)")
        if sampling.steps > (most := scheduler.config.num_train_timesteps):
            raise UserError(f"the DDPM has {most} steps; DDNM can take no more, not {sampling.steps}")
        self.unet, self.sampling, self.seed = unet.eval(), sampling, seed
        alpha_bar = scheduler.alphas_cumprod.float()
        self.register_buffer("alpha_bar", torch.cat((alpha_bar.new_ones(1), alpha_bar)), persistent=False)

    @classmethod
    def from_pretrained(cls, source: str | Path, sampling: Sampling, seed: int = 2025) -> "DDNM":
        """Load a DDPM pipeline of diffusers, a folder or a hub id; raises UserError where that is not possible."""
        unet, scheduler = load_ddpm(source)
        return cls(unet, scheduler, sampling, seed)

    def forward(
        self,
        y: Tensor,  # measurements of images in [0, 1]
        operator,  # ours or deepinv's, of images (batch, C, H, W), C = 1 or that of the network
        noise_level: float | Tensor | None = None,  # standard deviation of the noise in y, or (batch,) of them; None:
        # what `sampling` says
    ) -> Tensor:
        """Return x̂ (batch, C, H, W), about in [0, 1]; raises UserError where operator and network do not fit."""
        back_projection = operator.A_dagger(y)
        batch, channels, height, width = back_projection.shape
        wanted = self.unet.config.in_channels
        if channels not in (1, wanted):
            raise UserError(f"the operator measures images of {channels} channels, the DDPM is for {wanted}")
        generator = torch.Generator().manual_seed(self.seed)

        def draw() -> Tensor:
            return torch.randn(1, wanted, height, width, generator=generator).to(back_projection).repeat(batch, 1, 1, 1)

        sampling = self.sampling if noise_level is None else replace(self.sampling, noise_level=noise_level)
        averaged = channels < wanted
        x_hat = ddnm(y, ChannelMean(operator, wanted) if averaged else operator, self.estimate_noise,
                     self.alpha_bar, sampling, draw)
        return x_hat.mean(1, keepdim=True) if averaged else x_hat

    def estimate_noise(self, x: Tensor, i: int) -> Tensor:
        """Return ε (batch, C, H, W) of x_i; sides that the network does not take are padded by reflection."""
        (height, width), multiple = x.shape[-2:], 2 ** (len(self.unet.config.block_out_channels) - 1)
        padding = (0, -width % multiple, 0, -height % multiple)
        reflects = padding[1] < width and padding[3] < height
        padded = F.pad(x, padding, mode="reflect" if reflects else "replicate")
        epsilon = self.unet(padded, i - 1).sample  # diffusers counts its steps from 0
        return epsilon[:, :x.shape[1], :height, :width].to(x.dtype)


@dataclass(frozen=True)
class ChannelMean:
    """A ∘ m, where m is the mean of `channels` channels and A measures grey images; (A m)⁺ = m⁺ A⁺ since m m⁺ = 1."""

    operator: object  # A: (batch, 1, H, W) -> y
    channels: int

    def A(self, x: Tensor) -> Tensor:
        return self.operator.A(x.mean(1, keepdim=True))

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.operator.A_adjoint(y).repeat(1, self.channels, 1, 1) / self.channels

    def A_dagger(self, y: Tensor) -> Tensor:
        return self.operator.A_dagger(y).repeat(1, self.channels, 1, 1)


def load_ddpm(source: str | Path) -> tuple[UNet2DModel, DDPMScheduler]:
    """Load network, in fp32, and scheduler of a DDPM pipeline of diffusers, a folder or a hub id.

    Raises UserError where there is none.
    """
    logging.disable_progress_bar()  # of two small files
    try:
        pipeline = DDPMPipeline.from_pretrained(str(source), dtype=torch.float32, low_cpu_mem_usage=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"cannot load a DDPM from {source} ({first_line(error)}); name a folder or a hub id of a "
                        "DDPM pipeline of diffusers") from error
    finally:
        logging.enable_progress_bar()
    if not isinstance(pipeline.unet, UNet2DModel):
        raise UserError(f"the network of {source} is a {type(pipeline.unet).__name__}; DDNM needs a UNet2DModel")
    return pipeline.unet, pipeline.scheduler
