"""What half precision costs in PSNR: a test set's average in bf16 and fp16 against fp32.

    python benchmarks/precision_cost.py --testset_name Set11

On a CPU products of half-precision numbers are summed up in fp32 and rounded once, as a GPU's tensor cores do.
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.half_precision import half_products  # noqa: E402
from benchmarks.machine import machine, save_results  # noqa: E402
from model import IDM, WeightsError  # noqa: E402
from utils.comparison.published import RATIOS  # noqa: E402
from utils.data.testsets import load_testset  # noqa: E402
from utils.devices import PRECISIONS  # noqa: E402
from utils.errors import run  # noqa: E402
from utils.evaluation.evaluate import evaluate, mean_scores  # noqa: E402
from utils.evaluation.protocol import Protocol  # noqa: E402
from utils.flags import Parser, file_path  # noqa: E402
from utils.measurement import Measurement  # noqa: E402


def main() -> None:
    parser = Parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=file_path, default=Path("weight/compact"),
                        help="from the repository's folder, or absolute")
    parser.add_argument("--testset_name", default="Samples")
    parser.add_argument("--data_dir", type=file_path, default=ROOT / "data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=file_path, default=ROOT / "benchmarks" / "precision_cost.json")
    args = parser.parse_args()

    pictures = load_testset(args.testset_name, args.data_dir)
    net = IDM.from_checkpoint(ROOT / args.weights).eval().to(args.device)
    print(f"{args.testset_name}: PSNR, and what it is less than in fp32\n\n| | {' | '.join(PRECISIONS)} |\n"
          f"|{' --- |' * (1 + len(PRECISIONS))}")
    psnr = {}
    for ratio in RATIOS:
        psnr[str(ratio)] = scores = {}
        for precision in PRECISIONS:
            with half_products(args.device):
                protocol = Protocol(Measurement().with_settings(cs_ratio=ratio), precision)
                scores[precision] = mean_scores(evaluate(net, pictures, protocol, args.device)).psnr
        cells = [f"{scores[half]:.4f} ({scores['fp32'] - scores[half]:.4f})" for half in scores if half != "fp32"]
        print(f"| {100 * ratio:g} % | {scores['fp32']:.4f} | {' | '.join(cells)} |", flush=True)
    result = {"weights": str(args.weights), "testset": args.testset_name, "pictures": len(pictures),
              "machine": machine(args.device), "psnr": psnr}
    save_results(args.out, result)


if __name__ == "__main__":
    run(main, WeightsError)
