"""A user's mistake: one sentence on stderr, exit status 2, no traceback."""
import io
import os
import sys
import time
from collections.abc import Callable, Iterable

INTERRUPTED = 130  # the exit status of what Ctrl-C or SIGTERM ended
HEAD_START = 5  # seconds that rank 0 has to report a mistake before another rank does


class UserError(Exception):
    """Something the user can mend; the message says what is wrong and what to do."""


def first_line(error: Exception) -> str:
    """Return what went wrong in a few words: the operating system's, where they are, else the message's first line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason.strip().partition("\n")[0] or type(error).__name__


def printable(text: str) -> str:
    """Return `text` with all that a terminal would obey or cannot show escaped: control characters, line breaks, ..."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return names for a message, the first few of many, on one line whatever is in them."""
    names = list(names)
    shown = [name if name.isprintable() else ascii(name) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_first() -> bool:
    """Return whether this process speaks for all that `torch.distributed.run` started."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Print on stderr what a user should know; the first process alone does."""
    if is_first():
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)


def run(main: Callable[[], None], *also: type[Exception]) -> None:
    """Call `main`; turn a UserError, the operating system's or one of `also` into its message and exit status 2.

    What a terminal cannot show is shown escaped. Where nobody reads the output any more, as after `| head`, it ends.

    Of several processes, rank 0 speaks at once. Another rank waits a little and then says which it is: where the
    mistake is common to all, `torch.distributed.run` ends that rank before it repeats what rank 0 has said.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it ends
        sys.exit(1)
    except (UserError, OSError, *also) as error:
        if isinstance(error, OSError):
            error = f"cannot use {error.filename} ({first_line(error)})" if error.filename else first_line(error)
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(HEAD_START)
        print(f"error: {'' if rank == '0' else f'rank {rank}: '}{printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
