"""Reconstruct test sets from simulated measurements, print PSNR and SSIM, and write the pictures (paper, section 4).

    python test.py --cs_ratio 0.1/0.3/0.5 --testset_name Set11,CBSD68
    python test.py --operator inpainting --operator_settings keep=0.5 --noise 0.02
    python test.py --method ddnm --weights google/ddpm-celebahq-256 --sampling_steps 100
    python -m torch.distributed.run --nproc_per_node 4 test.py --cs_ratio 0.1

Of every picture x, `utils.evaluation.evaluate.reconstruct` measures y = operator.A(x), and the network recovers
x_hat = net(y, operator).  The operator and the noise are drawn from --seed and the picture's file name.
"""
import argparse
import itertools
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from baselines.flags import DdnmFlags, add_ddnm_flags, refuse_ddnm_flags
from model import WeightsError
from utils import distributed
from utils.data.images import remove_former, write_reconstruction
from utils.data.testsets import Picture, load_testset, passed_over, result_name, testset_names
from utils.devices import PRECISIONS
from utils.distributed import Process
from utils.errors import listed, note, printable, run
from utils.evaluation import METRICS, report
from utils.evaluation.evaluate import Metrics, Network, Result, Scores, evaluate_spread, mean_scores
from utils.evaluation.protocol import Protocol
from utils.evaluation.speed import compile_blocks, pick_precision
from utils.files import lock_folder, make_folder, remove
from utils.flags import Parser, file_path, integer, several
from utils.measurement_flags import add_measurement_flags, measurements
from utils.weights import PUBLISHED_EPOCH, WeightFlags


@dataclass(frozen=True)
class TestSet:
    """Pictures, what they are called together, and the folder for their results, one below it for each measurement."""

    name: str
    pictures: list[Picture]
    folder: Path


def main() -> None:
    args = parse_arguments()
    measured = measurements(args.operator, args.operator_settings, args.cs_ratio, args.block_size, args.noise,
                            args.seed)
    search = weight_flags(args)
    weights = [search.find(measurement) for measurement in measured]
    testsets = [open_testset(name, args.data_dir, args.result_dir)
                for name in testset_names(args.testset_name, args.data_dir)]
    process = distributed.start(args.device)
    metrics = {name: METRICS[name](process.device) for name in dict.fromkeys(("psnr", "ssim", *args.metrics))}

    loaded, scores = None, {}
    for measurement, path in zip(measured, weights, strict=True):
        if path != loaded:
            net, loaded = search.load(path, process.device), path
            process.print(opening(path, net, search.described(net), process, args))
            for line in search.notes(path, net, measurement):
                process.print(line)
            if args.compile:
                compile_blocks(net, process.device)
            if args.attention_window:
                net.attention_window = args.attention_window
        network = self_ensemble(net) if args.self_ensemble else net
        for testset in testsets:
            protocol = in_precision(args.precision, Protocol(measurement, batch_size=args.batch_size), process, network,
                                    testset.pictures)
            label = testset.name if len(measured) == 1 else f"{testset.name}/{measurement.name}"
            found = test(process, network, testset, protocol, metrics, label)
            process.print(report.summary(found, f"{testset.name} at {measurement.title}", metrics))
            scores[testset.name, measurement.title] = found
    if len(scores) > 1:
        process.print(report.table(scores, metrics))
        if len(set(weights)) > 1:
            for measurement, path in zip(measured, weights, strict=True):
                process.print(f"{measurement.title}: {printable(str(path))}")
    distributed.stop()


def test(
    process: Process,
    net: Network,
    testset: TestSet,
    protocol: Protocol,
    metrics: Metrics,
    label: str,  # before the pictures' names on the terminal
) -> Scores:
    """Reconstruct one test set; write each picture and, at the end, the scores."""
    folder, count, alone = testset.folder / protocol.measurement.name, len(testset.pictures), process.world_size == 1
    numbers = itertools.count(1)

    def tell(result: Result) -> None:
        report.print_result(result, f"[{next(numbers):02d}/{count:02d}] {label}", metrics)

    make_folder(folder, "--result_dir")
    with lock_folder(folder, "--result_dir") if process.is_main else nullcontext():
        if process.is_main:  # a former run's: were this one cut short, both would be mixed
            remove(folder / "scores.csv")
            remove_former(folder, {report.file_stem(picture.name) for picture in testset.pictures})
        # disable=None: a bar only where stderr is a terminal; of several processes it is about the first one's share
        with tqdm(total=math.ceil(count / process.world_size), leave=False,
                  disable=None if process.is_main else True) as bar:

            def each(picture: Picture, result: Result) -> None:
                bar.update()
                if alone:
                    tell(result)
                write_reconstruction(folder / report.result_file(result), result.reconstruction, picture.ycrcb)

            results = evaluate_spread(process, net, testset.pictures, protocol, metrics, each)
        scores = mean_scores(results, metrics)
        if process.is_main:
            for result in [] if alone else results:
                tell(result)
            report.write_scores(folder / "scores.csv", results)
    return scores


def in_precision(precision: str, protocol: Protocol, process: Process, net: Network,
                 pictures: list[Picture]) -> Protocol:
    """Return the protocol in this precision; auto picks one, and says why."""
    if precision == "auto":
        precision, reason = pick_precision(process, net, pictures, protocol)
        process.print(f"precision {reason}")
    return replace(protocol, precision=precision)


def weight_flags(args: argparse.Namespace) -> WeightFlags | DdnmFlags:
    """Return what finds, loads and describes the network of --method."""
    if args.method == "ddnm":
        return DdnmFlags.of(args)
    refuse_ddnm_flags(args)
    return WeightFlags(args.weights, args.model_dir, args.epoch, args.step_number)


def opening(path: Path, net: Network, described: str, process: Process, args: argparse.Namespace) -> str:
    """Return the first line: which weights, of what size, on what."""
    parameters = sum(parameter.numel() for parameter in net.parameters())
    extras = [", self-ensemble of 8 orientations"] * args.self_ensemble
    extras += [f", {process.world_size} processes"] * (process.world_size > 1)
    return (f"{printable(str(path))}: {parameters:,} parameters, {described}, on {process.device} in "
            f"{args.precision}{''.join(extras)}")


def self_ensemble(net: Network) -> Network:
    from model import SelfEnsemble  # with the network, which takes seconds to import

    return SelfEnsemble(net)


def open_testset(name: str, data_dir: Path, result_dir: Path) -> TestSet:
    """Read a test set; what is in its folder and not read is noted."""
    pictures = load_testset(name, data_dir)
    if left := passed_over(name, data_dir):
        note(f"of {name}, not read as pictures: {listed(left)}")
    return TestSet(name, pictures, result_dir / result_name(name))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--epoch", type=integer(0), help=f"which of the saved epochs to load; {PUBLISHED_EPOCH}, else the newest of "
        "train.py, if not given")
    add("--step_number", type=integer(1), help="T, the sampling steps of the weights to look for, 3 if not given; of "
        "--weights, trained with --random_steps, so many of the steps, the last")
    add_measurement_flags(parser)
    add("--model_dir", type=file_path, help="folder of the weights; weight, here or beside test.py, if not given")
    add("--data_dir", type=file_path, default="data", help="folder of the test sets")
    add("--testset_name", default="Set11", help="a folder of pictures in the data folder, or a folder or a picture by "
        "its path, or Samples, which needs none; several as Set11,CBSD68")
    add("--result_dir", type=file_path, default="result", help="folder for reconstructions and scores")
    add("--weights", type=file_path,
        help="a published .pkl or a folder of train.py, instead of looking in the folder of the weights")
    add_ddnm_flags(parser)
    add("--device", help="cpu, cuda, cuda:1, ...; the first GPU, where there is one, if not given")
    add("--precision", choices=(*PRECISIONS, "auto"), default="fp32",
        help="what the network computes in; auto: the fastest that costs at most 0.01 dB on the first pictures")
    add("--batch_size", type=integer(1),
        help="pictures of one size to reconstruct together; if not given, 1 on a CPU, 8 of 256x256 on a GPU")
    add("--compile", action="store_true", help="compile the network first; pays for large test sets")
    add("--attention_window", type=integer(1),
        help="side, in tokens, of the windows that attention works in: faster for large pictures, and a little worse "
             "where the weights were trained without; if not given, as trained")
    add("--self_ensemble", action="store_true",
        help="reconstruct each picture in its eight orientations and take the mean: better, and eight times as slow")
    add("--metrics", type=several(METRICS), default=[],
        help=f"beside PSNR and SSIM; several as lpips,fid, of {', '.join(METRICS)}; lpips and fid need torchmetrics "
        "and its weights")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, WeightsError)
