"""Reconstruct test sets from simulated measurements, print PSNR and SSIM, and write the pictures (paper, section 4).

    python test.py --cs_ratio 0.1/0.3/0.5 --testset_name Set11,CBSD68
    python -m torch.distributed.run --nproc_per_node 4 test.py --cs_ratio 0.1
"""
import argparse
import csv
import io
import itertools
import math
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from model import IDM, SelfEnsemble, WeightsError
from utils import distributed
from utils.data.images import remove_former, write_reconstruction
from utils.data.testsets import Picture, load_testset
from utils.devices import PRECISIONS, memory_suffices
from utils.distributed import Process
from utils.errors import UserError, run
from utils.evaluation.evaluate import Result, Scores, evaluate_spread, mean_scores
from utils.evaluation.metrics import SSIM_WINDOW
from utils.evaluation.perceptual import Fid, Lpips
from utils.evaluation.speed import compile_blocks, pick_precision
from utils.files import hold, make_folder, remove, write_whole
from utils.flags import LARGEST_BLOCK, Parser, percent, place, ratios, run_name, whole

METRICS = {"lpips": Lpips, "fid": Fid}
PUBLISHED_EPOCH = 50  # of the files that the authors give away


def main() -> None:
    args = parse_arguments()
    process = distributed.start(args.device)
    weights = {ratio: find_weights(args, ratio) for ratio in args.cs_ratio}
    testsets = {name: load_testset(name, args.data_dir) for name in args.testset_name}
    metrics = {name: METRICS[name](process.device) for name in args.metrics}

    loaded, scores = None, {}
    for ratio in args.cs_ratio:
        if weights[ratio] != loaded:
            net, loaded = load_network(weights[ratio], args, process), weights[ratio]
        for name, pictures in testsets.items():
            scores[name, ratio] = test(process, net, name, pictures, ratio, metrics, args)
            process.print(summary(scores[name, ratio], name, ratio))
    if len(scores) > 1:
        process.print(table(scores))
        if len(set(weights.values())) > 1:
            process.print("\n".join(f"{percent(ratio)} %: {path}" for ratio, path in weights.items()))
    distributed.stop()


def test(process: Process, net: IDM, name: str, pictures: list[Picture], ratio: float,
         metrics: dict[str, Lpips | Fid], args: argparse.Namespace) -> Scores:
    """Reconstruct one test set at one ratio; write each picture and, at the end, the scores."""
    folder = args.result_dir / name / percent(ratio)
    make_folder(folder, "--result_dir")
    with hold(folder, "--result_dir") if process.is_main else nullcontext():
        return reconstruct(process, net, name, pictures, ratio, metrics, folder, args)


def reconstruct(process: Process, net: IDM, name: str, pictures: list[Picture], ratio: float,
                metrics: dict[str, Lpips | Fid], folder: Path, args: argparse.Namespace) -> Scores:
    """`test` in its folder, which is this run's alone."""
    precision, network = args.precision, SelfEnsemble(net) if args.self_ensemble else net
    if precision == "auto":
        precision, reason = pick_precision(process, network, pictures, ratio, args.block_size, args.seed,
                                           net.size_multiple, args.batch_size)
        process.print(f"precision {reason}")
    if process.is_main:  # a former run's: were this one cut short, both would be mixed
        remove(folder / "scores.csv")
        remove_former(folder, {picture.name for picture in pictures})
    label = name if len(args.cs_ratio) == 1 else f"{name}/{percent(ratio)}"
    lpips, fid = metrics.get("lpips"), metrics.get("fid")
    alone, numbers = process.world_size == 1, itertools.count(1)
    # disable=None: a bar only where stderr is a terminal; of several processes it is about the first one's share
    with tqdm(total=math.ceil(len(pictures) / process.world_size), leave=False,
              disable=None if process.is_main else True) as bar:

        def each(picture: Picture, result: Result) -> None:
            bar.update()
            if alone:
                report(result, next(numbers), len(pictures), label)
            file = f"{result.name}_PSNR_{result.psnr:.2f}_SSIM_{result.ssim:.4f}.png"
            write_reconstruction(folder / file, result.reconstruction, picture.ycrcb)
            if fid:
                fid.add(picture.luminance, result.reconstruction)

        results = evaluate_spread(process, network, pictures, ratio, args.block_size, args.seed, precision,
                                  net.size_multiple, args.batch_size, {"LPIPS": lpips} if lpips else {}, each)
    scores = mean_scores(results)
    if fid:
        scores.others["FID"] = fid.value()
    if process.is_main:
        for result in [] if alone else results:
            report(result, next(numbers), len(pictures), label)
        write_scores(folder / "scores.csv", results)
    return scores


def report(result: Result, number: int, count: int, label: str) -> None:
    """A picture's line, and on stderr what is to be said of its scores."""
    tqdm.write(f"[{number:02d}/{count:02d}] {label}/{result.name}  PSNR: {result.psnr:.2f} dB  "
               f"SSIM: {result.ssim:.4f}{more(result.others)}  {result.seconds:.2f} s")
    sys.stdout.flush()
    if math.isnan(result.psnr):
        tqdm.write(f"warning: the reconstruction of {result.name} is not finite", file=sys.stderr)
    elif math.isnan(result.ssim):
        tqdm.write(f"note: {result.name} is smaller than SSIM's window of {SSIM_WINDOW}x{SSIM_WINDOW}, so that its "
                   "SSIM and the set's average are nan", file=sys.stderr)


def find_weights(args: argparse.Namespace, ratio: float) -> Path:
    """What --weights names; else the published file of this ratio, or train.py's folder; else the compact weights."""
    if args.weights is not None:
        if not args.weights.exists():
            raise UserError(f"--weights names {args.weights}, which does not exist")
        return args.weights
    here = Path(__file__).resolve().parent / "weight"
    model_dirs = [args.model_dir] if args.model_dir else [Path("weight"), here]
    name = run_name([ratio], args.step_number, args.block_size)
    file = f"net_params_{PUBLISHED_EPOCH if args.epoch is None else args.epoch}.pkl"
    for folder in (model_dir / name for model_dir in model_dirs):
        published = folder / file
        if os.path.lexists(published):  # a link to nothing is not the same as nothing: loading it will say so
            return published
        if others := sorted(path.name for path in folder.glob("net_params_*.pkl")):  # other weights are never taken
            raise UserError(f"{folder} holds {', '.join(others)}, but not {file}; choose an --epoch")
        if os.path.lexists(folder / "pretrained"):
            return folder / "pretrained"
    compact = [model_dir / "compact" for model_dir in model_dirs]
    if found := [path for path in compact if path.exists()]:
        return found[0]
    raise UserError(f"there are no weights for ratio {ratio:g}, neither {model_dirs[0] / name / file} nor "
                    f"{compact[0]}; train them with train.py, or name others with --weights")


def load_network(path: Path, args: argparse.Namespace, process: Process) -> IDM:
    """Load weights and say which; their number of steps is what counts."""
    net, device = IDM.from_checkpoint(path).eval(), process.device
    parameters, steps = sum(p.numel() for p in net.parameters()), net.config.num_steps
    spread = f", {process.world_size} processes" if process.world_size > 1 else ""
    ensemble = ", self-ensemble of 8 orientations" if args.self_ensemble else ""
    process.print(f"{path}: {parameters:,} parameters, T = {steps}, on {device} in {args.precision}{ensemble}{spread}")
    if args.step_number != steps:
        process.print(f"these weights are for T = {steps}; --step_number {args.step_number} does not apply")
    if args.epoch is not None and path.name != f"net_params_{args.epoch}.pkl":
        why = "--weights names them" if args.weights else "these weights are the only ones there"
        process.print(f"{why}; --epoch {args.epoch} does not apply")
    with memory_suffices(f"for the network on {device}; choose another --device"):
        net.to(device, memory_format=torch.channels_last)  # what GPUs' convolutions take in half precision
    if args.compile:
        compile_blocks(net, device)
    return net


def write_scores(path: Path, results: list[Result]) -> None:
    """Write name, PSNR, SSIM and seconds of each picture, and what else was measured, in full precision."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("name", "psnr", "ssim", "seconds", *map(str.lower, results[0].others)))
    rows.writerows((result.name, result.psnr, result.ssim, result.seconds, *result.others.values())
                   for result in results)
    write_whole(path, text.getvalue().encode())


def summary(scores: Scores, name: str, ratio: float) -> str:
    return (f"Average PSNR: {scores.psnr:.2f} dB  SSIM: {scores.ssim:.4f}{more(scores.others)}  "
            f"{scores.seconds:.2f} s an image, "
            f"over {scores.count} picture{'s' if scores.count > 1 else ''} of {name} at {percent(ratio)} %")


def more(others: dict[str, float]) -> str:
    return "".join(f"  {name}: {value:.4f}" for name, value in others.items())


def table(scores: dict[tuple[str, float], Scores]) -> str:
    """Test sets in rows, ratios in columns."""
    sets, columns = (list(dict.fromkeys(keys)) for keys in zip(*scores, strict=True))
    others = next(iter(scores.values())).others
    rows = [[" / ".join(("PSNR (dB)", "SSIM", *others, "seconds an image"))]
            + [f"{percent(ratio)} %" for ratio in columns]]
    for name in sets:
        rows.append([name])
        for cell in (scores[name, ratio] for ratio in columns):
            digits = [f"{value:.4f}" for value in (cell.ssim, *cell.others.values())]
            rows[-1].append(" / ".join((f"{cell.psnr:.2f}", *digits, f"{cell.seconds:.2f}")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n" + "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--epoch", type=whole(0), help=f"which of the saved epochs to load; {PUBLISHED_EPOCH} if not given")
    add("--step_number", type=whole(1), default=3, help="T, the sampling steps of the weights to load")
    add("--cs_ratio", type=ratios, default="0.1", help="M / N in (0, 1]; several as 0.1/0.3/0.5")
    add("--block_size", type=whole(1, LARGEST_BLOCK), default=32,
        help="B: rows of B² pixels are measured by themselves")
    add("--model_dir", type=place, help="folder of the weights; weight, here or beside test.py, if not given")
    add("--data_dir", type=place, default="data", help="folder of the test sets")
    add("--testset_name", type=names, default="Set11",
        help="a folder of pictures in the data folder, or Samples, which needs none; several as Set11,CBSD68")
    add("--result_dir", type=place, default="result", help="folder for reconstructions and scores")
    add("--weights", type=place,
        help="a published .pkl or a folder of train.py, instead of looking in the folder of the weights")
    add("--device", help="cpu, cuda, cuda:1, ...; the first GPU, where there is one, if not given")
    add("--precision", choices=(*PRECISIONS, "auto"), default="fp32",
        help="what the network computes in; auto: the fastest that costs at most 0.01 dB on the first pictures")
    add("--batch_size", type=whole(1),
        help="pictures of one size to reconstruct together; if not given, 1 on a CPU, 8 of 256x256 on a GPU")
    add("--compile", action="store_true", help="compile the network first; pays for large test sets")
    add("--self_ensemble", action="store_true",
        help="reconstruct each picture in its eight orientations and take the mean: better, and eight times as slow")
    add("--metrics", type=metrics, default=[],
        help="lpips, fid or lpips,fid beside PSNR and SSIM; for those who have torchmetrics and the weights")
    add("--seed", type=whole(0), default=2025, help="of the sampling matrix and the permutations")
    return parser.parse_args()


def metrics(text: str) -> list[str]:
    values = [part.strip().lower() for part in re.split("[/,]", text)]
    if not all(value in METRICS for value in values):
        raise argparse.ArgumentTypeError(f"must be {', '.join(METRICS)} or several of them, not {text}")
    return list(dict.fromkeys(values))


def names(text: str) -> list[str]:
    values = [part.strip() for part in re.split("[/,]", text.rstrip("/"))]
    folder = Path(text)
    if len(values) > 1 and folder.is_dir():
        raise argparse.ArgumentTypeError(f"takes no path; use --data_dir {folder.parent} --testset_name {folder.name}")
    if not all(part.strip(".") for part in values):
        raise argparse.ArgumentTypeError(f"must be a folder in the data folder, or several as Set11,CBSD68, not {text}")
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    run(main, WeightsError)
