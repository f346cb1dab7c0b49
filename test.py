"""Reconstruct test sets from simulated measurements, print PSNR and SSIM, and write the pictures (paper, section 4).

    python test.py --cs_ratio 0.1/0.3/0.5 --testset_name Set11,CBSD68
"""
import argparse
import csv
import io
import math
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from model import IDM, WeightsError
from utils.devices import memory_suffices, open_device
from utils.errors import UserError, run
from utils.evaluation import PRECISIONS, Result, Scores, evaluate, mean_scores
from utils.files import make_folder, remove, write_whole
from utils.flags import Parser, ratios, run_name, whole
from utils.images import remove_former, write_reconstruction
from utils.metrics import SSIM_WINDOW
from utils.testsets import Picture, load_testset


def main() -> None:
    args = parse_arguments()
    device = open_device(args.device)
    weights = {ratio: find_weights(args, ratio) for ratio in args.cs_ratio}
    testsets = {name: load_testset(name, args.data_dir) for name in args.testset_name}

    loaded, scores = None, {}
    for ratio in args.cs_ratio:
        if weights[ratio] != loaded:
            net, loaded = load_network(weights[ratio], args, device), weights[ratio]
        for name, pictures in testsets.items():
            results = test(net, name, pictures, ratio, device, args)
            scores[name, ratio] = mean_scores(results)
            print(summary(scores[name, ratio], name, ratio), flush=True)
    if len(scores) > 1:
        print(table(scores))
        if len(set(weights.values())) > 1:
            print("\n".join(f"{100 * ratio:.10g} %: {path}" for ratio, path in weights.items()))


def test(net: IDM, name: str, pictures: list[Picture], ratio: float, device: torch.device,
         args: argparse.Namespace) -> list[Result]:
    """Reconstruct one test set at one ratio; write each picture and, at the end, the scores."""
    folder = Path(args.result_dir) / name / f"{100 * ratio:.10g}"
    make_folder(folder, "--result_dir")
    remove(folder / "scores.csv")  # of a former run: were this one cut short, they would mislead
    stream = evaluate(net, pictures, ratio, args.block_size, args.seed, device, args.precision,
                      net.size_multiple)
    results = []
    # disable=None: a bar only where stderr is a terminal
    for picture, result in zip(pictures, tqdm(stream, total=len(pictures), leave=False, disable=None), strict=True):
        results.append(result)
        tqdm.write(f"[{len(results):02d}/{len(pictures):02d}] {name}/{result.name}  PSNR: {result.psnr:.2f} dB  "
                   f"SSIM: {result.ssim:.4f}  {result.seconds:.2f} s")
        sys.stdout.flush()
        if math.isnan(result.psnr):
            tqdm.write(f"warning: the reconstruction of {result.name} is not finite", file=sys.stderr)
        elif math.isnan(result.ssim):
            tqdm.write(f"note: {result.name} is smaller than SSIM's window of {SSIM_WINDOW}x{SSIM_WINDOW}, so that its "
                       "SSIM and the set's average are nan", file=sys.stderr)
        file = f"{result.name}_PSNR_{result.psnr:.2f}_SSIM_{result.ssim:.4f}.png"
        write_reconstruction(folder / file, result.reconstruction, picture.ycrcb)
        remove_former(folder, result.name, keep=file)
    write_scores(folder / "scores.csv", results)
    return results


def find_weights(args: argparse.Namespace, ratio: float) -> Path:
    """What --weights names; else the published file of this ratio, or train.py's folder; else the compact weights."""
    if args.weights is not None:
        if not Path(args.weights).exists():
            raise UserError(f"--weights names {args.weights}, which does not exist")
        return Path(args.weights)
    model_dir = Path(args.model_dir)
    folder = model_dir / run_name([ratio], args.step_number, args.block_size)
    published = folder / f"net_params_{args.epoch}.pkl"
    others = sorted(path.name for path in folder.glob("net_params_*.pkl"))
    if others and not published.exists():  # never fall back silently to other weights than those being trained
        raise UserError(f"{folder} holds {', '.join(others)}, but not {published.name}; choose an --epoch")
    compact = (model_dir / "compact", Path(__file__).resolve().parent / "weight" / "compact")
    for path in (published, folder / "pretrained", *compact):
        if path.exists():
            return path
    raise UserError(f"there are no weights for ratio {ratio:g}: neither {published} nor {compact[0]} exists; "
                    "train them with train.py, or name others with --weights")


def load_network(path: Path, args: argparse.Namespace, device: torch.device) -> IDM:
    """Load weights and say which; their number of steps is what counts."""
    net = IDM.from_checkpoint(path).eval()
    parameters, steps = sum(p.numel() for p in net.parameters()), net.config.num_steps
    print(f"{path}: {parameters:,} parameters, T = {steps}, on {device} in {args.precision}", flush=True)
    if args.step_number != steps:
        print(f"these weights are for T = {steps}; --step_number {args.step_number} does not apply", flush=True)
    with memory_suffices(f"for the network on {device}; choose another --device"):
        return net.to(device)


def write_scores(path: Path, results: list[Result]) -> None:
    """Write name, PSNR, SSIM and seconds of each picture, in full precision."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("name", "psnr", "ssim", "seconds"))
    rows.writerows((result.name, result.psnr, result.ssim, result.seconds) for result in results)
    write_whole(path, text.getvalue().encode())


def summary(scores: Scores, name: str, ratio: float) -> str:
    return (f"Average PSNR: {scores.psnr:.2f} dB  SSIM: {scores.ssim:.4f}  {scores.seconds:.2f} s an image, "
            f"over {scores.count} picture{'s' if scores.count > 1 else ''} of {name} at {100 * ratio:.10g} %")


def table(scores: dict[tuple[str, float], Scores]) -> str:
    """Test sets in rows, ratios in columns."""
    names, ratios = (list(dict.fromkeys(keys)) for keys in zip(*scores, strict=True))
    rows = [["PSNR (dB) / SSIM / seconds an image"] + [f"{100 * ratio:.10g} %" for ratio in ratios]]
    for name in names:
        cells = (scores[name, ratio] for ratio in ratios)
        rows.append([name] + [f"{cell.psnr:.2f} / {cell.ssim:.4f} / {cell.seconds:.2f}" for cell in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n" + "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epoch", type=whole(0), default=50, help="which of the saved epochs to load")
    add("--step_number", type=whole(1), default=3, help="T, the sampling steps of the weights to load")
    add("--cs_ratio", type=ratios, default="0.1", help="M / N in (0, 1]; several as 0.1/0.3/0.5")
    add("--block_size", type=whole(1), default=32, help="B: rows of B² pixels are measured by themselves")
    add("--model_dir", default="weight", help="folder of the weights")
    add("--data_dir", default="data", help="folder of the test sets")
    add("--testset_name", type=names, default="Set11",
        help="a folder of pictures in the data folder, or Samples, which needs none; several as Set11,CBSD68")
    add("--result_dir", default="result", help="folder for reconstructions and scores")
    add("--weights", help="a published .pkl or a folder of train.py, instead of looking in the folder of the weights")
    add("--device", help="cpu, cuda, cuda:1, ...; the first GPU, where there is one, if not given")
    add("--precision", choices=PRECISIONS, default="fp32", help="what the network computes in")
    add("--seed", type=whole(0), default=2025, help="of the sampling matrix and the permutations")
    return parser.parse_args()


def names(text: str) -> list[str]:
    values = [part.strip() for part in re.split("[/,]", text)]
    if not all(part.strip(".") for part in values):
        raise argparse.ArgumentTypeError(f"must be a folder in the data folder, or several as Set11,CBSD68, not {text}")
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    run(main, WeightsError)
