"""README's picture: photographs, what their measurements give back by themselves, reconstructions, and details of all.

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

from model import IDM, WeightsError  # noqa: E402
from utils.comparison.published import RATIOS  # noqa: E402
from utils.data.images import in_8_bits  # noqa: E402
from utils.data.testsets import Picture, load_testset  # noqa: E402
from utils.errors import UserError, listed, run  # noqa: E402
from utils.evaluation.evaluate import evaluate  # noqa: E402
from utils.evaluation.protocol import Protocol  # noqa: E402
from utils.files import write_atomic  # noqa: E402
from utils.flags import Parser, file_path  # noqa: E402
from utils.measurement import Measurement  # noqa: E402

WEIGHTS = ROOT / "weight" / "compact"
CAPTION, GAP = 26, 4  # pixels
DETAIL, ENLARGED = 128, 4  # height of the enlarged detail in pixels, and how many times it is enlarged
DETAILS = {"chelsea": (70, 30), "coffee": (196, 160)}  # top left corner of a picture's detail; of others the middle


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--pictures", default="chelsea,coffee", help="of the Samples")
    parser.add_argument("--weights", type=file_path, default=WEIGHTS)
    parser.add_argument("--out", type=file_path, default=ROOT / "figs" / "teaser.png")
    args = parser.parse_args()
    draw(args.out, args.pictures.split(","), args.weights)


@torch.inference_mode()
def draw(path: Path, names: Sequence[str] = ("chelsea", "coffee"), weights: Path = WEIGHTS) -> None:
    net = IDM.from_checkpoint(weights)
    samples = {picture.name: picture for picture in load_testset("Samples")}
    if unknown := [name for name in names if name not in samples]:
        raise UserError(f"the Samples have no picture {listed(unknown)}; they have {listed(samples, len(samples))}")
    _, png = cv2.imencode(".png", np.concatenate(
        [row(net, samples[name], DETAILS.get(name, (112, 96))) for name in names]))
    write_atomic(path, png.tobytes())


def row(net: IDM, picture: Picture, detail: tuple[int, int]) -> np.ndarray:
    """Return the pictures above, their details and captions below: (H + DETAIL + CAPTION, 5 W, 3) uint8, BGR."""
    def at(ratio: float) -> Protocol:
        return Protocol(Measurement().with_settings(cs_ratio=ratio))

    (back,) = evaluate(lambda y, operator: operator.A_adjoint(y), [picture], at(RATIOS[0]))
    tiles = [tile(colour(picture, picture.luminance), detail, "photograph"),
             tile(grey(back.reconstruction), detail, f"back-projection, 10 %: {back.psnr:.2f} dB")]
    for ratio in RATIOS:
        (result,) = evaluate(net, [picture], at(ratio))
        tiles.append(tile(colour(picture, result.reconstruction), detail,
                          f"IDM from {100 * ratio:g} %: {result.psnr:.2f} dB"))
    return np.concatenate(tiles, axis=1)


def tile(image: np.ndarray, detail: tuple[int, int], text: str) -> np.ndarray:
    """Return an image (H, W, 3) with a frame around the detail whose top left corner is given, and that enlarged."""
    (top, left), width = detail, image.shape[1]
    height, length = DETAIL // ENLARGED, width // ENLARGED
    large = np.repeat(np.repeat(image[top:top + height, left:left + length], ENLARGED, 0), ENLARGED, 1)
    framed = cv2.rectangle(image.copy(), (left - 1, top - 1), (left + length, top + height), (255, 255, 255), 1)
    strip = np.full((CAPTION, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (4, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    stacked = np.concatenate((framed, np.full((GAP, width, 3), 255, np.uint8), large, strip))
    return np.pad(stacked, ((0, 0), (0, GAP), (0, 0)), constant_values=255)


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


if __name__ == "__main__":
    run(main, WeightsError)
