"""Reconstruct photographs of your own, of any size, from simulated measurements.

    python reconstruct.py holiday.jpg --cs_ratio 0.1
    python reconstruct.py pictures/ --operator inpainting --operator_settings keep=0.5 --keep measured,back_projection

Of a colour photograph the luminance is measured and recovered, as in the paper; Cr and Cb are the photograph's own.
"""
import argparse
import io
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import SelfEnsemble, WeightsError
from utils.data.images import file_stem, find_pictures, is_picture_name, read_picture, write_reconstruction
from utils.data.testsets import Picture
from utils.devices import PRECISIONS, memory_suffices, open_device
from utils.errors import UserError, listed, note, printable, run
from utils.evaluation.evaluate import STANDARD, Measured, Network, Result, in_255, measure, score
from utils.evaluation.photograph import fitting_window, recover, window_note
from utils.evaluation.report import shown
from utils.files import make_folder, write_atomic
from utils.flags import Parser, file_path, integer, several
from utils.interrupts import interruptible
from utils.measurement import Measurement
from utils.measurement_flags import add_measurement_flags, measurements
from utils.weights import WeightFlags, load_network

KEEP = ("measured", "back_projection")


@dataclass(frozen=True)
class Job:
    """How every photograph is treated."""

    network: Network
    measurement: Measurement
    shared: dict  # what the operators of all photographs have in common
    device: torch.device
    precision: str
    keep: list[str]  # of KEEP


def main() -> None:
    args = parse_arguments()
    measurement, *more = measurements(args.operator, args.operator_settings, args.cs_ratio, args.block_size, args.noise,
                                      args.seed)
    if more:
        raise UserError("reconstruct.py takes one --cs_ratio at a time")
    folder = args.result_dir / measurement.name
    targets = find_targets(args.photos, folder)
    if left := passed_over(args.photos, folder):
        note(f"not read as pictures: {listed(left)}")
    weights = WeightFlags(args.weights, step_number=args.step_number)
    path, device = weights.find(measurement), open_device(args.device)
    make_folder(folder, "--result_dir")
    net = interruptible(lambda: load_network(path, device))
    for line in [f"{printable(str(path))}: T = {net.config.num_steps}, {measurement.title}, on {device}",
                 *weights.notes(path, net, measurement)]:
        print(line)
    trained = net.attention_window
    network = SelfEnsemble(net) if args.self_ensemble else net
    shared = interruptible(lambda: measurement.shared(device))
    job = Job(network, measurement, shared, device, args.precision, args.keep)

    unread = []
    for number, (photo, target) in enumerate(targets.items(), start=1):
        try:
            picture = Picture(photo.stem, *read_picture(photo), photo.name)
        except UserError as error:
            unread.append(photo)
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
            continue
        net.attention_window = fitting_window(trained, picture.luminance.size, args.attention_window)
        result = reconstruct(job, picture, target)
        height, width = picture.luminance.shape
        size = ", ".join([f"{width}x{height}", *window_note(net)])
        print(f"[{number}/{len(targets)}] {printable(str(target))}  {size}  "
              f"{shown(result.scores, STANDARD)}  {result.density:.3g} measurements a pixel  {result.seconds:.1f} s",
              flush=True)
    if unread:
        raise UserError(f"{len(unread)} of {len(targets)} photographs could not be read")


def reconstruct(job: Job, picture: Picture, target: Path) -> Result:
    """Measure one photograph, recover it, and write what is to be kept; shows a bar on a terminal meanwhile."""
    with memory_suffices(f"to measure {picture.name}: crop it"):
        measured = interruptible(lambda: measure([picture], job.measurement, job.shared, job.device))
    done = 0.0

    def advance(share: float) -> None:
        nonlocal done
        done = share

    with tqdm(total=1.0, desc=printable(picture.name)[:30], leave=False, disable=None,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left") as bar:
        x_hat, seconds = interruptible(lambda: recover(job.network, measured, job.precision, advance),
                                       lambda: bar.update(done - bar.n))
    result = score(picture, x_hat[0], seconds, measured.numbers)
    if not np.isfinite(result.psnr) and np.isnan(result.reconstruction).any():
        raise UserError(f"the reconstruction of {picture.name} is not finite; use --precision fp32 or other weights")
    for name in job.keep:
        write_kept(name, measured, picture, target)
    write_reconstruction(target, result.reconstruction, picture.ycrcb)
    return result


def write_kept(name: str, measured: Measured, picture: Picture, target: Path) -> None:
    """Write NAME_back_projection.png, the picture A⁺y, or NAME_measured.npy, the numbers y, beside the result."""
    if name == "back_projection":
        back_projection = measured.operator.A_dagger(measured.y)[0]
        write_reconstruction(target.with_name(f"{target.stem}_{name}.png"),
                             in_255(back_projection, picture.luminance.shape), picture.ycrcb)
    else:
        numbers = io.BytesIO()
        np.save(numbers, measured.y[0].cpu().numpy())
        write_atomic(target.with_name(f"{target.stem}_{name}.npy"), numbers.getvalue())


def find_targets(photos: list[Path], folder: Path) -> dict[Path, Path]:
    """Return for every photograph named, or found in a folder named, where its reconstruction goes: below `folder`.

    Raises UserError where there is none, or where two would go to one file.
    """
    targets: dict[Path, Path] = {}
    for photo in photos:
        if photo.is_dir():
            found = {photo / name: Path(photo.resolve().name) / name for name in find_pictures(photo)}
        elif photo.exists():
            found = {photo: Path(photo.name)}
        else:
            raise UserError(f"there is no photograph {photo}")
        short = Counter(name.with_suffix("") for name in found.values())  # a.jpg and a.tif make a.jpg.png and a.tif.png
        targets |= {path: folder / name.with_name(f"{file_stem(name.stem if alone else name.name)}.png")
                    for path, name in found.items() for alone in [short[name.with_suffix("")] == 1]
                    if not path.resolve().is_relative_to(folder.resolve())}  # what a former run wrote
    sources: dict[Path, Path] = {}
    for photo, target in targets.items():
        if target in sources:
            raise UserError(f"the reconstructions of {sources[target]} and of {photo} would both be {target}; rename "
                            "one, or reconstruct them into two folders with --result_dir")
        sources[target] = photo
    return targets


def passed_over(photos: list[Path], folder: Path) -> list[str]:
    """Return the files below the folders named that are no pictures by their names, without those below `folder`."""
    return [str(path) for photo in photos if photo.is_dir() for path in sorted(photo.rglob("*"))
            if path.is_file() and not is_picture_name(path.name) and not path.name.startswith(".")
            and not path.resolve().is_relative_to(folder.resolve())]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("photos", type=file_path, nargs="+", metavar="PHOTO", help="pictures, and folders of pictures")
    add_measurement_flags(parser)
    add("--result_dir", type=file_path, default="result/photographs", help="folder for the reconstructions")
    add("--keep", type=several(KEEP), default=[],
        help="write more than the reconstruction: measured, the numbers y; back_projection, the picture A⁺y; or both")
    add("--weights", type=file_path,
        help="a published .pkl or a folder of train.py; if not given, those that test.py would use")
    add("--step_number", type=integer(1), help="T, the sampling steps of the weights to look for, 3 if not given; of "
        "--weights, trained with --random_steps, so many of the steps, the last")
    add("--device", help="cpu, cuda, cuda:1, ...; the first GPU, where there is one, if not given")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="what the network computes in")
    add("--attention_window", type=integer(1),
        help="side of the windows, in tokens, within which attention works; if not given, 32 in pictures of more than "
        "512x512 pixels, where the weights were trained without")
    add("--self_ensemble", action="store_true",
        help="reconstruct in eight orientations and take the mean: better, and eight times as slow")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, WeightsError)
