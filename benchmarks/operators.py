"""What the weights recover from measurements of other kinds, beside A⁺y and a classical answer to each.

    python benchmarks/operators.py --data_dir data

Eight photographs, the Samples, for all but noisy compressed sensing, which is measured on Set11; MRI and CT of the
Shepp-Logan phantom, too. The table goes into docs/operators.md; redraw.py draws the picture strip, of one photograph.
"""
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from skimage.data import shepp_logan_phantom
from skimage.restoration import denoise_tv_chambolle, inpaint_biharmonic
from skimage.transform import iradon, resize
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import load_results, machine, save_results  # noqa: E402
from benchmarks.operators_report import show  # noqa: E402
from model import IDM, WeightsError  # noqa: E402
from model.operators import LinearOperator, dagger  # noqa: E402
from utils.data.testsets import Picture, load_testset  # noqa: E402
from utils.errors import run  # noqa: E402
from utils.evaluation.evaluate import Network, evaluate, mean_scores  # noqa: E402
from utils.evaluation.protocol import Protocol  # noqa: E402
from utils.flags import Parser, file_path  # noqa: E402
from utils.measurement import Measurement  # noqa: E402

TV_STEPS = 60  # of the accelerated proximal gradient method


def biharmonic(y: Tensor, operator: LinearOperator) -> Tensor:
    """Smooth interpolation of the pixels that are seen."""
    return from_numpy(inpaint_biharmonic(y[0, 0].numpy(), operator.mask.numpy() == 0))


def bicubic(y: Tensor, operator: LinearOperator) -> Tensor:
    """Cubic interpolation of the means; y is these times the factor, so that A Aᵀ = I."""
    height, width = operator.image_shape
    return from_numpy(resize(y[0, 0].numpy() * y.shape[-1] / width, (height, width), order=3, mode="edge"))


def zero_filled(y: Tensor, operator: LinearOperator) -> Tensor:
    """Frequencies that were not measured are taken to be 0."""
    return operator.A_adjoint(y)


def filtered_back_projection(y: Tensor, operator: LinearOperator) -> Tensor:
    """The ramp filter, then back-projection."""
    theta, side = np.linspace(0, 180, operator.angles, endpoint=False), operator.image_shape[0]
    sinogram = (operator.angles * side) ** 0.5 * y[0, 0].numpy().T  # without the operator's scale
    return from_numpy(iradon(sinogram.astype(float), theta, output_size=side, circle=False))


def total_variation(y: Tensor, operator: LinearOperator, weight: float) -> Tensor:
    """argmin ½‖A x − y‖² + weight · TV(x), by FISTA; ‖A‖ = 1."""
    x = z = operator.A_adjoint(y)
    t = 1.0
    for _ in range(TV_STEPS):
        step = z - operator.A_adjoint(operator.A(z) - y)
        new = from_numpy(denoise_tv_chambolle(step[0, 0].numpy(), weight, max_num_iter=30))
        after = (1 + (1 + 4 * t * t) ** 0.5) / 2
        x, z, t = new, new + (t - 1) / after * (new - x), after
    return x


def from_numpy(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.astype(np.float32))[None, None]


@dataclass(frozen=True)
class Task:
    """A measurement and the classical answer to it."""

    title: str
    measurement: Measurement
    classical: Callable[[Tensor, LinearOperator], Tensor]
    weights: str = "operators"  # those that were fine-tuned for it, in weight/
    testset: str = "Samples"

    @property
    def classical_name(self) -> str:
        function = getattr(self.classical, "func", self.classical)
        return function.__name__.replace("_", " ")


def noisy(sigma: float, weight: float) -> Task:
    return Task(f"compressed sensing at 30 %, noise {sigma:g}",
                Measurement(settings={"cs_ratio": 0.3, "block_size": 32}, noise=(sigma, sigma)),
                partial(total_variation, weight=weight), "noisy", "Set11")


TASKS = [
    Task("inpainting, half of the pixels", Measurement("inpainting", {"keep": 0.5}), biharmonic),
    Task("inpainting, a box of a tenth", Measurement("inpainting", {"keep": 0.9, "kind": "box"}), biharmonic),
    Task("super-resolution 2×", Measurement("super_resolution", {"factor": 2}), bicubic),
    Task("super-resolution 4×", Measurement("super_resolution", {"factor": 4}), bicubic),
    Task("MRI 4×, of photographs", Measurement("mri", {"acceleration": 4.0}), zero_filled),
    Task("CT, 30 views, of photographs", Measurement("ct", {"angles": 30}), filtered_back_projection),
    Task("MRI 4×, of a phantom", Measurement("mri", {"acceleration": 4.0}), zero_filled, testset="Shepp-Logan"),
    Task("CT, 30 views, of a phantom", Measurement("ct", {"angles": 30}), filtered_back_projection,
         testset="Shepp-Logan"),
    noisy(0.02, 0.01),
    noisy(0.05, 0.02),
]


def phantom() -> Picture:
    """scikit-image's phantom of a head, 400×400, at 256×256."""
    image = resize(shepp_logan_phantom(), (256, 256), anti_aliasing=True)
    return Picture("phantom", np.clip(255 * image, 0, 255).round().astype(np.uint8))


def answers(task: Task, weights: Path) -> Iterator[tuple[str, Network]]:
    """What recovers a picture, by name."""
    before = IDM.from_checkpoint(weights / "compact")
    yield "A⁺y", lambda y, operator: dagger(operator, y)
    yield "classical", task.classical
    if task.measurement.noise[1]:
        yield "compact, not told σ", lambda y, operator: before(y, operator)
    yield "compact", before
    if (weights / task.weights).exists():
        yield "fine-tuned", IDM.from_checkpoint(weights / task.weights)


@torch.inference_mode()
def measure(pictures: dict[str, list[Picture]], weights: Path, results: dict, save: Callable[[], None]) -> None:
    """Score all answers to all tasks that are not scored yet."""
    for task in TASKS:
        row = results["scores"].setdefault(task.title, {})
        for name, answer in answers(task, weights):
            if name not in row:
                scores = mean_scores(evaluate(answer, pictures[task.testset], Protocol(task.measurement)))
                row[name] = {"psnr": round(scores.psnr, 4), "ssim": round(scores.ssim, 4)}
                print(f"{task.title}: {name} {scores.psnr:.2f} dB", flush=True)
                save()


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=file_path, default=ROOT / "data", help="folder of Set11")
    parser.add_argument("--weights", type=file_path, default=ROOT / "weight", help="its compact, operators, noisy")
    parser.add_argument("--out", type=file_path, default=ROOT / "benchmarks" / "operators.json", help="goes on from it")
    parser.add_argument("--report", type=file_path, default=ROOT / "docs" / "operators.md")
    args = parser.parse_args()
    pictures = {name: load_testset(name, args.data_dir) for name in ("Samples", "Set11")} | {"Shepp-Logan": [phantom()]}
    results = load_results(args.out) or {"machine": machine(), "scores": {}}
    measure(pictures, args.weights, results, lambda: save_results(args.out, results))
    show(results, {task.title: (task.testset, task.classical_name) for task in TASKS}, args.report)


if __name__ == "__main__":
    run(main, WeightsError)
