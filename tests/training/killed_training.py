"""Trains by train.py over and over in forked processes that are killed with SIGKILL at random moments, until done.

One process that has imported everything forks the others, so that many lives take little time. It is told what to do by
JSON on its command line, and prints what happened as JSON.
"""
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # noqa: E402
import utils.training.loop  # noqa: E402
import utils.training.start  # noqa: E402, F401  which train.main would import in every life


def live(flags: list[str], processes: int, port: int) -> list[int]:
    """Fork the processes of one training run; their process numbers."""
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = ["train.py", *flags]
        output = os.open(os.environ["OUTPUT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            train.main()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return children


def writing(folder: Path, since: float, name: str = "*") -> bool:
    """Whether there is a file of this name that was half written since then."""
    for path in folder.rglob(f".{name}.partial"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime > since:
                return True
    return False


def wait(children: list[int], seconds: float, enough: Callable[[], bool] = lambda: False) -> list[int]:
    """Wait for processes to end, or for `enough`; those that have not ended in that time."""
    until = time.monotonic() + seconds
    while children and time.monotonic() < until and not enough():
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        time.sleep(0.001)
    return children


def kill(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main() -> None:
    task = json.loads(sys.argv[1])
    draw, folder, port = random.Random(task["seed"]), Path(task["folder"]), task["port"]
    kills = half_written = 0
    for number in range(task["kills"]):
        port += 1
        children, since = live(task["flags"], task["processes"], port), time.time()
        if number % 2:  # at any moment
            running = wait(children, draw.uniform(0, task["longest_life"]))
        else:  # in the midst of the first state
            running = wait(children, 60, enough=lambda since=since: writing(folder, since, "state_*"))
            time.sleep(draw.uniform(0, 0.05))
        if not running:
            break
        # All at once, as when the power fails, or one alone, whose death the other may notice by itself.
        first = running if draw.random() < 0.5 else [draw.choice(running)]
        kill(first)
        half_written += writing(folder, since)
        kill(wait([child for child in running if child not in first], 2))
        kills += 1
    start = time.monotonic()
    running = wait(live(task["flags"], task["processes"], port + 1), 300)
    kill(running)
    print(json.dumps({"kills": kills, "half_written": half_written, "ended": not running,
                      "seconds": time.monotonic() - start}))


if __name__ == "__main__":
    main()
