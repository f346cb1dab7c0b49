"""Test sets from their public homes into data/, every picture checked; and what to fetch by hand, for all else.

    python -m utils.download Set11 CBSD68 Urban100 DIV2K
    python -m utils.download --check
"""
import argparse
import os
import shutil
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from utils.data.testsets import KNOWN_SETS
from utils.download.fetch import HOMES, offers
from utils.download.verify import CHECKSUMS, WATERLOO, check_testset, check_waterloo, check_weights, find, verdict
from utils.errors import UserError, listed, printable, run
from utils.files import lock_folder, make_folder, write_atomic
from utils.flags import Parser, file_path, run_name

WEIGHTS = tuple(f"{run_name([ratio], 3, 32)}/net_params_50.pkl" for ratio in (0.1, 0.3, 0.5))
NAMES = (*HOMES, "Waterloo", "weights")
NOTES = """\
The addresses were written from memory, and none could be tried where this was written. So nothing is trusted for where
it comes from: each picture must have its known SHA-256, of the file or of its decoded pixels. CBSD68, Urban100
and DIV2K are cut from the originals. An interrupted download goes on where it stopped. Files that are there already are
checked and never overwritten.

A mirror, --from, is a folder or an http(s) address at which there is SET.zip, or SET/FILE, or for CBSD68 and DIV2K the
archive named above; or such an archive itself. In a folder or an archive, the pictures' names do not matter.

Exit status: 0, all that was named is there and right; 1, something is missing, wrong, or too much (test.py would
average over further pictures in a set's folder); 2, it could not be done."""


def main() -> None:
    args = parse_arguments()
    if not args.names and not args.check:
        print(overview())
        return
    failed, wrong = False, False
    for name in args.names or NAMES:
        if name in HOMES and not args.check:
            try:
                get(name, args.source, args.data_dir)
            except UserError as error:
                print(f"error: {name}: {printable(str(error))}", file=sys.stderr)
                failed = True
                if not (args.data_dir / name).exists():
                    continue
        wrong |= not check(name, args)
    if failed or wrong:
        sys.exit(2 if failed else 1)


def get(
    name: str,  # of a set in HOMES
    source: str | None,  # a mirror: a folder, an archive, or an http(s) address; None: the set's home
    data_dir: Path,  # the pictures go to data_dir/name; what is not finished yet to data_dir/.download/name
) -> None:
    """Fetch the pictures of a test set that are not there yet; what is there is never touched.

    Raises UserError where pictures could not be had; those that could are written then.
    """
    folder, cache = data_dir / name, data_dir / ".download" / name
    missing = {file: known for file, known in CHECKSUMS[name].items() if not os.path.lexists(folder / file)}
    if not missing:
        return
    make_folder(cache, "--data_dir")
    otherwise = "" if source else f"; otherwise, {by_hand(name)}"
    refused, seen = [], 0
    try:
        with (lock_folder(cache.parent, "--data_dir"),
              tqdm(total=len(missing), desc=name, unit="picture", leave=False, disable=None) as bar):
            for label, file, content in offers(name, list(missing), source, cache):
                seen += 1
                found = find(content, missing, HOMES[name].shifts)
                if found is not None:
                    write_atomic(folder / found[0], found[1])
                    del missing[found[0]]
                    bar.update()
                elif file in missing:
                    refused.append(f"{label} {verdict(content, missing[file])}")
                if not missing:
                    break
            shutil.rmtree(cache, ignore_errors=True)
    except UserError as error:
        raise UserError(f"{error}{otherwise}") from error
    finally:
        with suppress(OSError):  # it contains what an interrupted download needs, or is not there
            cache.rmdir()
    if missing:
        why = f"; refused: {listed(refused, 1)}" if refused else ""
        raise UserError(f"none of the {seen} pictures from {source or HOMES[name].address} is or contains "
                        f"{listed(missing)}{why}{otherwise}")


def check(name: str, args: argparse.Namespace) -> bool:
    """Print the state of a set or the weights; returns whether it is right, or neither there nor asked for by name."""
    if name == "weights":
        rights = [check_weights(path) for path in (args.model_dir / file for file in WEIGHTS) if os.path.lexists(path)]
        return all(rights) if rights else _absent(name, args)
    folder = args.data_dir / ("pristine_images" if name == "Waterloo" else name)
    if not os.path.lexists(folder):
        return _absent(name, args)
    return check_waterloo(folder) if name == "Waterloo" else check_testset(name, folder)


def _absent(name: str, args: argparse.Namespace) -> bool:
    how = f"python -m utils.download {name} fetches it" if name in HOMES else \
        by_hand(name, args.data_dir, args.model_dir)
    print(f"{name}: not there{f'; {how}' if args.names else ''}")
    return not args.names


# --- what a person is told -----------------------------------------------------------------------------------------

def by_hand(name: str, data_dir: str = "data", model_dir: str = "weight") -> str:
    """Say what to fetch in a browser, and where to put it."""
    if name == "Waterloo":
        return ("in a browser, get the Waterloo Exploration Database (https://kedema.org/project/exploration/ or "
                f"https://ece.uwaterloo.ca/~k29ma/exploration/) and put its {WATERLOO:,} BMP files into "
                f"{Path(data_dir, 'pristine_images')}; then run python -m utils.download --check Waterloo")
    if name == "weights":
        places = ", ".join(str(Path(model_dir, file)) for file in WEIGHTS)
        return ("in a browser, follow the links to the models at https://github.com/Guaishou74851/IDM and put the "
                f"files at {places}; then run python -m utils.download --check weights")
    home = HOMES[name]
    what = f"{home.archive} from {home.page} into a folder F" if home.archive else \
        f"the set's pictures from {home.page} into a folder F/{name}"
    return f"in a browser, get {what}; then run python -m utils.download {name} --from F"


def overview() -> str:
    """List all that can be named, where it comes from, and what is to be known about it."""
    lines = [f"{name:10}{len(CHECKSUMS[name])} pictures: {KNOWN_SETS[name]}\n{'':10}from {home.address}"
             for name, home in HOMES.items()]
    lines += [textwrap.fill(f"{name:10}by hand: {by_hand(name)}", 118, subsequent_indent=" " * 10,
                            break_long_words=False, break_on_hyphens=False) for name in NAMES if name not in HOMES]
    return "\n".join([*lines, "", NOTES])


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Fetch test sets into data/ and check them; say what to fetch by hand.", epilog=overview(),
                    prog="python -m utils.download", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(NAMES)}")
    parser.add_argument("--from", dest="source", metavar="FOLDER_OR_URL", type=os.path.expanduser,
                        help="a mirror to take the test sets from")
    parser.add_argument("--check", action="store_true",
                        help="fetch nothing; check the files of the sets named, or of all that are there")
    parser.add_argument("--data_dir", type=file_path, default="data",
                        help="where the sets' folders are (default: %(default)s)")
    parser.add_argument("--model_dir", type=file_path, default="weight",
                        help="where the weights' folders are (default: %(default)s)")
    args = parser.parse_args()
    for name in args.names:
        if name not in NAMES:
            raise UserError(f"{name} is not known here; choose from {', '.join(NAMES)}")
    args.names = list(dict.fromkeys(args.names))
    if args.source == "":
        raise UserError("--from must not be empty; the current folder is .")
    if args.source and "://" in args.source and not args.source.startswith(("http://", "https://")):
        raise UserError(f"--from takes a folder, an archive, or an http(s) address, not {args.source}")
    return args


if __name__ == "__main__":
    run(main)
