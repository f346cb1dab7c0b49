"""Score folders of result pictures, anybody's, against a test set: tables, figures, and a report to look at.

    python compare.py --testset_name Set11 --cs_ratio 0.1 --methods IDM=result OCTUF=OCTUF/Set11_10 --with_published

A file is matched to its ground truth by name, whatever else the name says; what cannot be matched or scored is listed.
"""
import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from utils.comparison.compare import Comparison, find_folder, score_method
from utils.comparison.published import published_averages
from utils.comparison.report import write_report
from utils.comparison.tables import (
    averages_csv,
    averages_table,
    latex,
    markdown,
    notes,
    pictures_table,
    remark_lines,
    scores_csv,
    terminal,
    wrapped,
)
from utils.data.testsets import Picture, load_testset
from utils.errors import UserError, first_line, run
from utils.files import lock_folder, make_folder, write_atomic
from utils.flags import Parser, percent, place, positive, ratios


def main() -> None:
    args = parse_arguments()
    folders = method_folders(args)
    pictures = load_testset(args.testset_name, args.data_dir)
    chosen = choose(args, pictures)
    folder = args.result_dir / args.testset_name / percent(args.cs_ratio)
    for name, path in folders.items():
        if path.resolve() == folder.resolve():
            raise UserError(f"{folder} holds the pictures of {name} and their scores; choose another --result_dir")
    make_folder(folder, "--result_dir")
    with lock_folder(folder, "--result_dir"):
        compare(args, folders, pictures, chosen, folder)


def compare(args: argparse.Namespace, folders: dict[str, Path], pictures: list[Picture], chosen: list[int],
            folder: Path) -> None:
    """Score the methods' folders; print it, and write tables, figures and the report into `folder`."""
    methods = [score_method(name, path, pictures, bar(name)) for name, path in folders.items()]
    published = published_averages(args.testset_name, args.cs_ratio) if args.with_published else []
    comparison = Comparison(args.testset_name, args.cs_ratio, [picture.name for picture in pictures], methods,
                            published)
    print_comparison(comparison)
    if args.with_published and not published:
        print(f"note: no averages are published for {comparison.title}; --with_published adds no row")

    written = write_tables(folder, comparison)
    if chosen:
        from utils.comparison.figures import write_figures
        regions = write_figures(folder / "figures", comparison, [pictures[k] for k in chosen], args.region)
        written += [f"figures/{name}.pdf and .png (region {','.join(map(str, region))})"
                    for name, region in regions.items()]
    report = folder / "report.html"
    shown = write_report(report, comparison, pictures, chosen, args.report_size)
    note = "" if len(shown) == len(pictures) else f", shows {len(shown)} of {len(pictures)} pictures, see --report_size"
    written.append(f"{report.name} ({report.stat().st_size / 1e6:.1f} MB{note})")
    print("\n" + wrapped([f"Written to {folder}: {', '.join(written)}"]))


def method_folders(args: argparse.Namespace) -> dict[str, Path]:
    """The folder of each method, by name: those of --methods, then those of --root."""
    found = [(name, find_folder(path, args.testset_name, args.cs_ratio)) for name, path in args.methods]
    if args.root is not None:
        found += folders_below(args.root, args.testset_name, args.cs_ratio)
    if not found:
        raise UserError("there is nothing to compare: name folders of pictures with --methods NAME=FOLDER, or --root")
    folders = {}
    for name, path in found:
        if name in folders:
            raise UserError(f"two methods are named {name}, {folders[name]} and {path}; rename one")
        if not name.isprintable():  # a line break, or bytes that are no text
            raise UserError(f"the name of the method {ascii(name)} cannot be printed; rename it")
        if re.fullmatch(r"\d+(\.\d+)?", path.name) and path.name != percent(args.cs_ratio):
            print(wrapped([f"note: {name}: {path} is named as pictures at {path.name} % are"]), end="\n\n")
        folders[name] = path
    return folders


def folders_below(root: Path, testset: str, cs_ratio: float) -> list[tuple[str, Path]]:
    """The folders of `root` that hold pictures, with their names; the others are printed."""
    try:
        names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"--root: cannot list {root}: {first_line(error)}") from error
    found, without = [], []
    for name in names:
        try:
            found.append((name, find_folder(root / name, testset, cs_ratio)))
        except UserError as error:
            without.append(f"note: --root: left out: {error}")
    if not found:
        raise UserError(f"--root: {root} has no folder of pictures; it must have one for each method")
    if without:
        print(wrapped(without), end="\n\n")
    return found


def choose(args: argparse.Namespace, pictures: list[Picture]) -> list[int]:
    """The indices of --pictures, whose case may differ from the test set's; for them, --region is checked."""
    chosen = []
    for name in args.pictures:
        found = [k for k, own in enumerate(pictures) if own.name == name] or [
            k for k, own in enumerate(pictures) if own.name.casefold() == name.casefold()]
        if len(found) != 1:
            raise UserError(f"--pictures: {args.testset_name} has no picture {name}; it has "
                            f"{', '.join(picture.name for picture in pictures)}")
        chosen += found
    if args.region is not None and not chosen:
        raise UserError("--region says what figures enlarge: name the pictures to draw with --pictures")
    if chosen:
        try:  # now, for it takes a second, and before any work is done
            from utils.comparison.figures import check_region
        except ImportError as error:
            raise UserError("--pictures needs matplotlib; install it with pip install -r requirements.txt") from error
        if args.region is not None:
            check_region(args.region, [pictures[k] for k in chosen])
    return list(dict.fromkeys(chosen))


def bar(name: str) -> Callable[[list[Picture]], Iterable[Picture]]:
    """A bar for the pictures of one method, where stderr is a terminal."""
    return lambda pictures: tqdm(pictures, name, leave=False, disable=None)


def print_comparison(comparison: Comparison) -> None:
    print(f"{comparison.title}: PSNR and SSIM of the Y channel; * best, + second\n")
    print(terminal(pictures_table(comparison)), end="\n\n")
    print(terminal(averages_table(comparison)), end="\n\n")
    print(wrapped([*notes(comparison), *remark_lines(comparison)]))


def write_tables(folder: Path, comparison: Comparison) -> list[str]:
    """Write the tables into a folder; returns the names of the files."""
    averages = averages_table(comparison)
    files = {
        "scores.csv": scores_csv(comparison),
        "averages.csv": averages_csv(comparison),
        "table.md": markdown(comparison),
        "averages.tex": latex(averages, apart=len(averages) - 1 - len(comparison.methods)),
        "pictures.tex": latex(pictures_table(comparison)),
    }
    for name, text in files.items():
        write_atomic(folder / name, text.encode())
    return list(files)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--testset_name", type=testset, default="Set11", help="a folder of ground truth in the data folder, or Samples")
    add("--cs_ratio", type=ratio, default="0.1", help="M / N in (0, 1], what the pictures were reconstructed from")
    add("--methods", type=method, nargs="+", action="extend", default=[], metavar="NAME=FOLDER",
        help="folders of result pictures; of FOLDER/SET/RATIO, as test.py writes, FOLDER is enough")
    add("--root", type=place, help="a folder with one folder for each method, besides or instead of --methods")
    add("--data_dir", type=place, default="data", help="folder of the test sets")
    add("--result_dir", type=place, default="result/compare",
        help="folder for tables, figures and report, in SET/RATIO")
    add("--with_published", action="store_true", help="add rows for the averages in the IDM paper's table")
    add("--pictures", type=names, default=[], metavar="NAME,NAME", help="draw figures of these pictures")
    add("--region", type=region, metavar="X,Y,W,H",
        help="what the figures enlarge, in pixels from the top left; where the methods differ most, if not given")
    add("--report_size", type=positive, default=200, metavar="MB", help="the most that the report may hold in pictures")
    return parser.parse_args()


def method(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name.strip() and equals and folder):
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, not {text}")
    return name.strip(), place(folder)


def testset(text: str) -> str:
    if not text.strip(".") or re.search("[/,\\\\]", text):
        raise argparse.ArgumentTypeError(f"must be one folder in the data folder, not {text}")
    return text


def ratio(text: str) -> float:
    values = ratios(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"must be one ratio at a time, not {text}")
    return values[0]


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def region(text: str) -> tuple[int, int, int, int]:
    if not re.fullmatch(r"\d{1,6}(,\d{1,6}){3}", text) or 0 in (values := tuple(map(int, text.split(","))))[2:]:
        raise argparse.ArgumentTypeError(f"must be x,y,width,height in pixels, as 64,80,48,48, not {text}")
    return values


if __name__ == "__main__":
    run(main)
