"""A user's mistake: one sentence on stderr, exit status 2, no traceback."""
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend; the message says what is wrong and what to do."""


def run(main: Callable[[], None], *also: type[Exception]) -> None:
    """Call `main`; turn a UserError, or one of the exceptions `also`, into its message and exit status 2."""
    try:
        main()
    except (UserError, *also) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
