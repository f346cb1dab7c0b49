"""README's picture: a photograph, what the camera keeps of it, what that gives back by itself, reconstructions by IDM.

    python benchmarks/teaser.py --out figs/teaser.png
"""
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import IDM, BlockCompressedSensing, WeightsError  # noqa: E402
from utils.comparison.published import RATIOS  # noqa: E402
from utils.data.images import in_8_bits  # noqa: E402
from utils.data.testsets import Picture, load_testset  # noqa: E402
from utils.errors import UserError, listed, run  # noqa: E402
from utils.evaluation.evaluate import evaluate  # noqa: E402
from utils.evaluation.protocol import Protocol  # noqa: E402
from utils.files import write_atomic  # noqa: E402
from utils.flags import Parser  # noqa: E402
from utils.measurement import Measurement  # noqa: E402

WEIGHTS = ROOT / "weight" / "compact"
CAPTION = 26  # pixels


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--pictures", default="chelsea,coffee", help="of the Samples")
    parser.add_argument("--weights", default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=ROOT / "figs" / "teaser.png")
    args = parser.parse_args()
    draw(args.out, args.pictures.split(","), args.weights)


@torch.inference_mode()
def draw(path: Path, names: Sequence[str] = ("chelsea", "coffee"), weights: Path = WEIGHTS) -> None:
    net = IDM.from_checkpoint(weights)
    samples = {picture.name: picture for picture in load_testset("Samples")}
    if unknown := [name for name in names if name not in samples]:
        raise UserError(f"the Samples have no picture {listed(unknown)}; they have {listed(samples, len(samples))}")
    _, png = cv2.imencode(".png", np.concatenate([row(net, samples[name]) for name in names], axis=0))
    write_atomic(path, png.tobytes())


def row(net: IDM, picture: Picture) -> np.ndarray:
    """(H + caption, 6 W, 3) uint8, BGR."""
    measured = []

    def back_project(y: torch.Tensor, operator: BlockCompressedSensing) -> torch.Tensor:
        measured.append(y)
        return operator.A_adjoint(y)

    (back,) = evaluate(back_project, [picture], Protocol(Measurement().with_settings(cs_ratio=RATIOS[0])))
    tiles = [caption(colour(picture, picture.luminance), "photograph"),
             caption(numbers(measured[0].flatten().numpy(), picture.luminance.shape), "what the camera keeps at 10 %"),
             caption(grey(back.reconstruction), f"A'y at 10 %: {back.psnr:.2f} dB")]
    for ratio in RATIOS:
        (result,) = evaluate(net, [picture], Protocol(Measurement().with_settings(cs_ratio=ratio)))
        label = f"compact IDM, {100 * ratio:g} %: {result.psnr:.2f} dB"
        tiles.append(caption(colour(picture, result.reconstruction), label))
    return np.concatenate(tiles, axis=1)


def numbers(y: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Measurements as a square of pixels, black at -3 σ and white at 3 σ, in the middle of a white (H, W, 3) tile."""
    side = int(len(y) ** 0.5)
    levels = np.clip(127.5 * (1 + y[:side**2].reshape(side, side) / (3 * y.std())), 0, 255)
    tile = np.full(shape, 255.0)
    top, left = ((length - side) // 2 for length in shape)
    tile[top:top + side, left:left + side] = levels
    return grey(tile)


def grey(luminance: np.ndarray) -> np.ndarray:
    """BGR of a luminance in [0, 255], without colours."""
    return cv2.cvtColor(in_8_bits(luminance), cv2.COLOR_GRAY2BGR)


def colour(picture: Picture, luminance: np.ndarray) -> np.ndarray:
    """BGR of a luminance in [0, 255], with the photograph's own colours, if it has any."""
    if picture.ycrcb is None:
        return grey(luminance)
    ycrcb = picture.ycrcb.copy()
    ycrcb[..., 0] = in_8_bits(luminance)
    return cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2BGR)


def caption(tile: np.ndarray, text: str) -> np.ndarray:
    strip = np.full((CAPTION, tile.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate((tile, strip), axis=0)


if __name__ == "__main__":
    run(main, WeightsError)
