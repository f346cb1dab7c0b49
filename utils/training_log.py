"""What a training run says about itself: the published text log, a line of JSON an epoch, and TensorBoard."""
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import append_line, write_whole


class TrainingLog:
    """Rank 0's pen. A run that goes on from a state adds to what there is.

    Args:
        folder: LOG_DIR; NAME.txt, NAME.jsonl and the folder NAME, for TensorBoard, are written into it.
        name: of the run.
        iteration: that the run goes on from. What was logged after it will be logged again and is dropped, but for the
            text log, which tells what happened.

    Raises:
        UserError: where a file cannot be written.
    """

    def __init__(self, folder: Path, name: str, iteration: int):
        self.text = folder / f"{name}.txt"
        self.records = folder / f"{name}.jsonl"
        self.board = _open_board(folder / name, iteration)
        if self.records.exists():
            kept = [line for line in self.records.read_text(encoding="utf-8", errors="replace").splitlines()
                    if _iteration(line) <= iteration]
            write_whole(self.records, "".join(f"{line}\n" for line in kept).encode())

    def line(self, text: str) -> None:
        """Print a line, and add it to the text log."""
        print(text, flush=True)
        append_line(self.text, text)

    def scalars(self, iteration: int, **values: float) -> None:
        """Points of TensorBoard's curves, a name each; those that are not finite are left out."""
        for name, value in values.items():
            if self.board and math.isfinite(value):
                self.board.add_scalar(name, value, iteration)

    def strip(
        self,
        iteration: int,
        name: str,
        pictures: list[np.ndarray],  # (H, W) in [0, 255] each, of one height; shown side by side
    ) -> None:
        """A row of pictures for TensorBoard."""
        if self.board:
            row = np.nan_to_num(np.hstack(pictures)).round().clip(0, 255).astype(np.uint8)
            self.board.add_image(name, row, iteration, dataformats="HW")

    def record(self, values: dict[str, Any]) -> None:
        """One line of JSON, which has "iteration" among its values; what is not finite becomes null."""
        append_line(self.records, json.dumps(_finite(values)))
        if self.board:
            self.board.flush()

    def close(self) -> None:
        if self.board:
            self.board.close()


def _open_board(folder: Path, iteration: int):
    """TensorBoard's writer; None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 of training needs it
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=iteration + 1)


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
