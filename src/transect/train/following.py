"""The rows of a training run read while they are being written, as curves over its steps."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from transect.errors import InputError

_OF_TRAINING = ("loss", "learning_rate", "tokens_per_second", "mfu", "peak_memory", "skipped_steps")
_OF_TEXT = "nats_per_token"
_RECENT = 20
Points = list[tuple[int, float]]


class Following:
    """A run, up to the last whole line of its rows.

    curves: by quantity (`loss`, `learning_rate`, `tokens_per_second`, `mfu`, `peak_memory`, `skipped_steps`, `text`)
    and by what there are several of: the part of the model that has a learning rate, or split and domain of the text.
    steps: of the whole run, or None where its settings do not say. step: of the last row.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError when the path is not the folder of a training run."""
        self.path = path
        self.name = path.resolve().name
        self.steps = _length(_settings(path))
        self._rows = path / "rows.jsonl"
        self._begin(None)

    def _begin(self, file: int | None) -> None:
        self._file, self._offset = file, 0
        self.step = 0
        self.curves: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(list))
        self._weights: dict[int, tuple[float, float]] = {}
        self._seconds: Points = []

    @property
    def done(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "rows.parquet").is_file()

    def read(self) -> None:
        """Take in what was written since; a run that went on from an earlier checkpoint is read again."""
        try:
            with self._rows.open("rb") as handle:
                known = self._rows.stat()
                if known.st_ino != self._file or known.st_size < self._offset:
                    self._begin(known.st_ino)
                handle.seek(self._offset)
                whole, newline, _ = handle.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(whole) + len(newline)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            self._take(line)

    def last(self, quantity: str, which: str | None = None) -> float | None:
        """The newest value; of several curves that of the first."""
        curves = self.curves.get(quantity, {})
        points = next(iter(curves.values()), []) if which is None else curves.get(which, [])
        return points[-1][1] if points else None

    def valid(self) -> Points:
        """Nats per token of all domains of `valid` together."""
        return [(step, nats / tokens) for step, (nats, tokens) in self._weights.items() if tokens]

    def left(self) -> float | None:
        """Seconds of training that are left, as fast as the last steps went; None where that is not known."""
        if self.steps is None or len(self._seconds) < 2:
            return None
        (first, then), (last, now) = self._seconds[0], self._seconds[-1]
        return None if last <= first else max(0, self.steps - last) * (now - then) / (last - first)

    def age(self) -> float | None:
        """Seconds since rows were written; None before the first."""
        try:
            return max(0.0, time.time() - self._rows.stat().st_mtime)
        except FileNotFoundError:
            return None

    def _take(self, line: str) -> None:
        # Most rows are of layers or of probes; only those that may be drawn are worth parsing.
        if not any(name in line for name in (*_OF_TRAINING, _OF_TEXT)):
            return
        try:
            row = json.loads(line)
            metric, value, step = row["metric"], row.get("value"), row["step"]
        except (ValueError, KeyError, TypeError):
            return
        self.step = max(self.step, step)
        if value is None:
            return
        if row.get("probe") == "train" and metric in _OF_TRAINING:
            self._take_number(metric, row, step, value)
        elif row.get("task") == "language_modelling" and metric == _OF_TEXT:
            self.curves["text"][f"{row.get('split')} {row.get('domain')}"].append((step, value))
            if row.get("split") == "valid" and row.get("n"):
                nats, tokens = self._weights.get(step, (0.0, 0.0))
                self._weights[step] = nats + value * row["n"], tokens + row["n"]

    def _take_number(self, metric: str, row: dict[str, Any], step: int, value: float) -> None:
        part = row.get("part") or ""
        if metric == "loss" and part != "main":
            return
        self.curves[metric][part].append((step, value))
        if metric == "loss" and row.get("seconds") is not None:
            self._seconds = [*self._seconds, (step, row["seconds"])][-_RECENT:]


def _settings(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or record.get("kind") != "training":
        raise InputError(f"{path} is not the folder of a training run; give the -o folder of `transect train`")
    return record


def _length(record: dict[str, Any]) -> int | None:
    try:
        recipe = record["recipe"]
        train, model = recipe["train"], recipe["model"]
        if train["steps"] is not None:
            return int(train["steps"])
        length = recipe["data"]["seq_len"] or model["max_positions"]
        return -(-int(train["tokens"]) // (train["batch_size"] * length))
    except (KeyError, TypeError):
        return None
