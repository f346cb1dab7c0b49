"""Score folders of result pictures, anybody's, against test sets: tables, figures, and reports to look at.

    python compare.py --testset_name Set11 --cs_ratio 0.1 --methods IDM=result OCTUF=OCTUF/Set11_10 --with_published
    python compare.py --testset_name Set11,CBSD68 --cs_ratio 0.1/0.3/0.5 --root methods

A file is matched to its ground truth by name, whatever else the name says; what cannot be matched or scored is listed.
"""
import argparse
import re
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils.comparison.compare import Comparison, Method, find_folder, ratio_names, score_method
from utils.comparison.matching import read_aliases
from utils.comparison.published import published_averages
from utils.comparison.report import write_report
from utils.comparison.tables import (
    averages_csv,
    averages_table,
    latex,
    markdown,
    notes,
    overview_table,
    pictures_table,
    remark_lines,
    scores_csv,
    terminal,
    wrapped,
)
from utils.data.images import file_stem
from utils.data.testsets import Picture, load_testset, result_name, testset_names
from utils.errors import UserError, first_line, listed, run
from utils.files import lock_folder, make_folder, write_atomic
from utils.flags import Parser, file_path, percent, positive, ratios


class Source(NamedTuple):
    """Where the pictures of a method are."""

    name: str
    folder: Path
    required: bool  # whether it is a mistake that it has none; else it is left out


def main() -> None:
    args = parse_arguments()
    args.testset_name = testset_names(args.testset_name, args.data_dir)
    sources = method_sources(args)
    testsets = {name: load_testset(name, args.data_dir) for name in args.testset_name}
    known = {picture.name for pictures in testsets.values() for picture in pictures}
    aliases, chosen = read_aliases(args.names, known) if args.names else {}, choose(args, testsets)
    found = {(name, ratio): find_sources(args, sources, name, ratio) for name in testsets for ratio in args.cs_ratio}
    if not any(found.values()):
        raise UserError(f"no method has pictures of {listed(testsets)}, see the notes above")
    comparisons = []
    for (name, ratio), these in found.items():
        if not these:
            continue
        folder = result_folder(args, name, ratio)
        make_folder(folder, "--result_dir")
        with lock_folder(folder, "--result_dir"):
            own = {picture.name for picture in testsets[name]}
            try:
                methods = score(these, testsets[name], {alias: name for alias, name in aliases.items() if name in own})
            except UserError:
                if len(found) == 1:
                    raise
                continue
            published = published_averages(name, ratio) if args.with_published else []
            comparison = Comparison(name, ratio, [picture.name for picture in testsets[name]], methods, published)
            report(args, comparison, testsets[name], chosen[name], folder)
            comparisons.append(comparison)
    if len(comparisons) > 1:
        report_all(args.result_dir, comparisons)


def method_sources(args: argparse.Namespace) -> list[Source]:
    """Return the methods of --methods, required where there is one test set at one ratio, then those of --root."""
    required = len(args.testset_name) * len(args.cs_ratio) == 1
    sources = [Source(name, folder, required) for name, folder in args.methods]
    if args.root is not None:
        try:
            below = sorted(path for path in args.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError as error:
            raise UserError(f"--root: cannot list {args.root}: {first_line(error)}") from error
        if not below:
            raise UserError(f"--root: {args.root} has no folder of pictures; it must have one for each method")
        sources += [Source(path.name, path, required=False) for path in below]
    if not sources:
        raise UserError("there is nothing to compare: name folders of pictures with --methods NAME=FOLDER, or --root")
    folders = {}
    for name, folder, _ in sources:
        if name in folders:
            raise UserError(f"two methods are named {name}, {folders[name]} and {folder}; rename one")
        if not name.isprintable():  # a line break, or bytes that are no text
            raise UserError(f"the name of the method {ascii(name)} cannot be printed; rename it")
        folders[name] = folder
    return sources


def find_sources(args: argparse.Namespace, sources: list[Source], testset: str, ratio: float) -> list[Source]:
    """Return the sources that have pictures of a test set at a ratio, with the very folders; the others are printed."""
    one_set, one_ratio = len(args.testset_name) == 1, len(args.cs_ratio) == 1
    found, folder = [], result_folder(args, testset, ratio)
    for source in sources:
        try:
            path = find_folder(source.folder, testset, ratio, one_set, one_ratio)
        except UserError as error:
            leave_out(source, error)
            continue
        if path.resolve() == (args.data_dir / testset).resolve():
            raise UserError(f"{path} is the test set itself, not what {source.name} made of it; name another folder")
        if path.resolve() == folder.resolve():
            raise UserError(f"{folder} holds the pictures of {source.name} and their scores; choose another "
                            "--result_dir")
        if re.fullmatch(r"\d+(\.\d+)?", path.name) and path.name not in ratio_names(ratio):
            print(wrapped([f"note: {source.name}: {path} is named as pictures at {path.name} % are"]), end="\n\n")
        found.append(source._replace(folder=path))
    return found


def score(sources: list[Source], pictures: list[Picture], aliases: dict[str, str]) -> list[Method]:
    """Score the methods' pictures, with a bar for each where stderr is a terminal; what has no score is left out."""
    methods = []
    for source in sources:
        try:
            methods.append(score_method(source.name, source.folder, pictures, aliases,
                                        lambda of, name=source.name: tqdm(of, name, leave=False, disable=None)))
        except UserError as error:
            leave_out(source, error)
            reason = error
    if not methods:
        raise reason
    return methods


def leave_out(source: Source, error: UserError) -> None:
    if source.required:
        raise error
    print(wrapped([f"note: {source.name} is left out: {error}"]), end="\n\n")


def report(args: argparse.Namespace, comparison: Comparison, pictures: list[Picture], chosen: list[int],
           folder: Path) -> None:
    """Print a comparison, and write tables, figures and the report into `folder`."""
    averages, by_picture = averages_table(comparison), pictures_table(comparison)
    told = (notes(comparison), remark_lines(comparison))
    print(f"{comparison.title}: * best, + second\n\n{terminal(by_picture)}\n\n{terminal(averages)}\n")
    print(wrapped([*told[0], *told[1]]))
    if args.with_published and not comparison.published:
        print(f"note: no averages are published for {comparison.title}; --with_published adds no row")
    written = write_texts(folder, {
        "scores.csv": scores_csv(comparison),
        "averages.csv": averages_csv([comparison]),
        "table.md": markdown(comparison.title, [averages, by_picture], *told),
        "averages.tex": latex(averages, apart=len(averages) - 1 - len(comparison.methods)),
        "pictures.tex": latex(by_picture),
    })
    if chosen:
        from utils.comparison.figures import write_figures
        regions = write_figures(folder / "figures", comparison, [pictures[k] for k in chosen], args.region)
        written += [f"figures/{file_stem(name)}.pdf and .png (region {','.join(map(str, region))})"
                    for name, region in regions.items()]
    shown = write_report(folder / "report.html", comparison, pictures, chosen, args.report_size)
    note = "" if len(shown) == len(pictures) else f", shows {len(shown)} of {len(pictures)} pictures, see --report_size"
    written.append(f"report.html ({(folder / 'report.html').stat().st_size / 1e6:.1f} MB{note})")
    print("\n" + wrapped([f"Written to {folder}: {', '.join(written)}"]) + "\n")


def report_all(folder: Path, comparisons: list[Comparison]) -> None:
    """Print one table of all test sets and ratios, and write it into `folder`."""
    table = overview_table(comparisons)
    told = [f"{comparison.title}: {line}" for comparison in comparisons for line in notes(comparison)[1:]]
    print(f"{terminal(table)}\n")
    written = write_texts(folder, {
        "table.md": markdown("All test sets and ratios", [table], notes(comparisons[0])[:1], told),
        "averages.tex": latex(table),
        "averages.csv": averages_csv(comparisons),
    })
    print(wrapped([f"Written to {folder}: {', '.join(written)}"]))


def write_texts(folder: Path, texts: dict[str, str]) -> list[str]:
    for name, text in texts.items():
        write_atomic(folder / name, text.encode())
    return list(texts)


def result_folder(args: argparse.Namespace, testset: str, ratio: float) -> Path:
    return args.result_dir / result_name(testset) / percent(ratio)


def choose(args: argparse.Namespace, testsets: dict[str, list[Picture]]) -> dict[str, list[int]]:
    """Return the indices of --pictures in each test set, where their case may differ; for them, --region is checked."""
    wanted = list(dict.fromkeys(name.casefold() for name in args.pictures))
    chosen = {testset: [k for name in wanted for k, picture in enumerate(pictures) if picture.name.casefold() == name]
              for testset, pictures in testsets.items()}
    names = [picture.name for pictures in testsets.values() for picture in pictures]
    if missing := [name for name in args.pictures if name.casefold() not in map(str.casefold, names)]:
        raise UserError(f"--pictures: {', '.join(testsets)} has no picture {missing[0]}; it has {listed(names, 20)}")
    if args.region is not None and not wanted:
        raise UserError("--region says what figures enlarge: name the pictures to draw with --pictures")
    if wanted:
        try:  # now, for it takes a second, and before any work is done
            from utils.comparison.figures import check_region
        except ImportError as error:
            raise UserError("--pictures needs matplotlib; install it with pip install -r requirements.txt") from error
        if args.region is not None:
            check_region(args.region, [testsets[testset][k] for testset, found in chosen.items() for k in found])
    return chosen


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--testset_name", default="Set11",
        help="a folder of ground truth in the data folder, or Samples; several as Set11,CBSD68")
    add("--cs_ratio", type=ratios, default="0.1",
        help="M / N in (0, 1], what the pictures were reconstructed from; several as 0.1/0.3/0.5")
    add("--methods", type=method, nargs="+", action="extend", default=[], metavar="NAME=FOLDER",
        help="folders of result pictures; of FOLDER/SET/RATIO, as test.py writes, or FOLDER/SET, FOLDER is enough")
    add("--root", type=file_path, help="a folder with one folder for each method, besides or instead of --methods")
    add("--names", type=file_path, metavar="MAP.CSV",
        help="for files named otherwise than the test set's: lines of a name, a comma, and the picture that it means")
    add("--data_dir", type=file_path, default="data", help="folder of the test sets")
    add("--result_dir", type=file_path, default="result/compare",
        help="folder for tables, figures and reports, in SET/RATIO")
    add("--with_published", action="store_true", help="add rows for the averages in the IDM paper's table")
    add("--pictures", type=names, default=[], metavar="NAME,NAME", help="draw figures of these pictures")
    add("--region", type=region, metavar="X,Y,W,H",
        help="what the figures enlarge, in pixels from the top left; where the methods differ most, if not given")
    add("--report_size", type=positive, default=200, metavar="MB", help="the most that a report may hold in pictures")
    return parser.parse_args()


def method(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name.strip() and equals and folder):
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, not {text}")
    return name.strip(), file_path(folder)


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def region(text: str) -> tuple[int, int, int, int]:
    if not re.fullmatch(r"\d{1,6}(,\d{1,6}){3}", text) or 0 in (values := tuple(map(int, text.split(","))))[2:]:
        raise argparse.ArgumentTypeError(f"must be x,y,width,height in pixels, as 64,80,48,48, not {text}")
    return values


if __name__ == "__main__":
    run(main)
