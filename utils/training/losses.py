"""What training makes small, between reconstructions and truth, both (batch, 1, H, W)."""
from torch import Tensor

SMALLEST_ERROR = 1e-8  # 80 dB: what is nearer to the truth has no gradient that grows without bound


def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    """Return mean |x̂ − x|, the published loss."""
    return (x_hat - x).abs().mean()


def log_mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """Return the mean over the batch of log(mean (x̂ − x)²): PSNR but for a factor, so that all ratios count alike."""
    return ((x_hat - x).square().flatten(1).mean(1) + SMALLEST_ERROR).log().mean()


LOSSES = {"l1": l1, "log_mse": log_mse}
