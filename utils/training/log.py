"""What a training run says about itself: the published text log, a line of JSON an epoch, and TensorBoard."""
import itertools
import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import append_line, explained, write_atomic

# Under "Custom scalars" all curves whose names match are in one chart.
CHARTS = {"network": {"v": ["Multiline", ["v/.*"]], "alpha": ["Multiline", ["schedule/.*"]]}}


class TrainingLog:
    """Rank 0's pen. A run that goes on from a state adds to what there is; one that begins puts an earlier one's aside.

    Args:
        folder: LOG_DIR; NAME.txt, NAME.jsonl and the folder NAME, for TensorBoard, are written into it.
        name: of the run.
        iteration: that the run goes on from. What was logged after it will be logged again and is dropped, but for the
            text log, which tells what happened.

    Attributes:
        iteration: of the last record, 0 where there is none.
        notice: a sentence about the logs put aside, or "".

    Raises:
        UserError: where a file cannot be written; so do all methods.
    """

    def __init__(self, folder: Path, name: str, iteration: int):
        self.text = folder / f"{name}.txt"
        self.records = folder / f"{name}.jsonl"
        self.curves = folder / name
        self.notice = "" if iteration else self._put_aside()
        self.board = self._open_board(iteration)
        self.iteration = 0
        if self.records.exists():
            kept = [line for line in self.records.read_text(encoding="utf-8", errors="replace").splitlines()
                    if _iteration(line) <= iteration]
            write_atomic(self.records, "".join(f"{line}\n" for line in kept).encode())
            self.iteration = max(map(_iteration, kept), default=0)

    def line(self, text: str) -> None:
        """Print a line with the time at its end, and add it to the text log."""
        print(self.note(text), flush=True)

    def note(self, text: str) -> str:
        """Add a line with the time at its end to the text log; returns the line."""
        text = f"{text}, {datetime.now():%Y-%m-%d %H:%M:%S}"
        append_line(self.text, text)
        return text

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Points of TensorBoard's curves, a name each; those that are not finite are left out."""
        with explained(self.curves):
            for name, value in values.items():
                if self.board and math.isfinite(value):
                    self.board.add_scalar(name, value, iteration)

    def picture(
        self,
        iteration: int,
        name: str,
        picture: np.ndarray,  # (H, W) uint8
    ) -> None:
        """A picture for TensorBoard."""
        if self.board:
            with explained(self.curves):
                self.board.add_image(name, picture, iteration, dataformats="HW")

    def record(self, values: dict[str, Any]) -> None:
        """One line of JSON, which has "iteration" among its values; what is not finite becomes null."""
        append_line(self.records, json.dumps(_finite(values)))
        self.iteration = values["iteration"]
        if self.board:
            with explained(self.curves):
                self.board.flush()

    def close(self) -> None:
        if self.board:
            with explained(self.curves):
                self.board.close()

    def _put_aside(self) -> str:
        """Rename what another run has logged under this name, if it has a record: NAME.1.txt, NAME.1.jsonl, NAME.1."""
        if not self.records.exists():
            return ""
        logs = [self.text, self.records, self.curves]
        for number in itertools.count(1):
            aside = [log.with_name(f"{self.curves.name}.{number}{log.name.removeprefix(self.curves.name)}")
                     for log in logs]
            if not any(path.exists() for path in aside):
                break
        for log, path in zip(logs, aside, strict=True):
            if log.exists():
                with explained(log):
                    log.rename(path)
        return f"an earlier run's log is kept as {aside[0]} and beside it"

    def _open_board(self, iteration: int):
        """TensorBoard's writer; None where TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 of training needs it
        except ImportError:
            return None
        with explained(self.curves):
            board = SummaryWriter(str(self.curves), purge_step=iteration + 1)
            board.add_custom_scalars(CHARTS)
            return board


def _iteration(line: str) -> float:
    """Of a record; infinity for a line that was cut short."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
