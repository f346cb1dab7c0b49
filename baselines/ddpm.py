"""An unconditional pixel-space DDPM of diffusers' own parts (Ho et al., 2020): its network, its schedule, its loss."""
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor


def small_unet(block_out_channels: tuple[int, ...] = (16, 32, 64, 128)) -> UNet2DModel:
    """Return a fresh noise estimator for grey pictures: 2.4 M parameters, convolutions alone, so of any size."""
    scales = len(block_out_channels)
    return UNet2DModel(in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=block_out_channels,
                       down_block_types=("DownBlock2D",) * scales, up_block_types=("UpBlock2D",) * scales,
                       norm_num_groups=8, add_attention=False)


def schedule() -> DDPMScheduler:
    """Return the published schedule: beta linear from 1e-4 to 0.02 over 1000 steps."""
    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def noise_loss(
    net: torch.nn.Module,  # a UNet2DModel, or DistributedDataParallel around it
    scheduler: DDPMScheduler,
    x: Tensor,  # (batch, 1, P, P) in [0, 1]
    generator: torch.Generator,  # on the CPU, so that every device draws the same
) -> Tensor:
    """Return mean |epsilon - net(sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) epsilon, t)|^2, x scaled to [-1, 1].

    One t is drawn from each of `batch` equal parts of the steps: uniform as published, with less variance of the mean.
    """
    batch, steps = len(x), scheduler.config.num_train_timesteps
    parts = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    t = (parts * steps).long().clamp(max=steps - 1).to(x.device)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    noisy = scheduler.add_noise(2 * x - 1, noise, t)
    return (net(noisy, t).sample - noise).square().mean()
