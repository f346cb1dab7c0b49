"""Testing a network on sets of pictures: the protocol, the metrics by name, spreading over processes."""
from .metrics import Metric, Psnr, Ssim
from .perceptual import Fid, Lpips

METRICS: dict[str, type[Metric]] = {"psnr": Psnr, "ssim": Ssim, "lpips": Lpips, "fid": Fid}
