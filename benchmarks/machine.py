"""What a measurement was made on, and how it is written down: as JSON, and as a table in a page of docs."""
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

from utils.files import write_atomic

START, END = "<!-- measured: begin -->", "<!-- measured: end -->"  # of a table in a page


def machine(device: str = "cpu") -> dict[str, str | int | float]:
    """Names and versions; "load" is how many processes wanted a CPU in the last minute, ours and others'."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else -1.0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }


def cpu_name() -> str:
    """The CPU's model where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def save_results(path: Path, results: dict) -> None:
    """Write results as JSON, whole or not at all."""
    write_atomic(path, (json.dumps(results, indent=1) + "\n").encode())


def load_results(path: Path) -> dict:
    """Read what `save_results` wrote; an empty dictionary where there is nothing yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save_table(page: Path, text: str, title: str) -> None:
    """Print Markdown, and put it between the marks in a page: a new one of this title where there is none."""
    print(text)
    old = page.read_text(encoding="utf-8") if page.exists() else f"# {title}\n\n{START}\n{END}\n"
    before, _, rest = old.partition(START)
    write_atomic(page, f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}".encode())


def table_row(cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
