"""The run folder: settings, environment, rows, and the state that a stopped run goes on from."""

import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from transect.errors import InputError
from transect.results import Row, Table, make_folder, to_line, whole_file, write_whole

_PACKAGES = ("transect", "torch", "transformers", "tokenizers", "numpy", "safetensors")


def fingerprint(value: Any) -> str:
    """16 hex digits of a JSON-ready value."""
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that one run writes: config.json, environment.json, rows.jsonl, rows.parquet; state.pt while it runs."""

    path: Path

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: dict, resume: bool) -> "RunFolder":
        """Make the folder, or take up one whose run was stopped.

        Raises InputError when it holds another run's files, was made with other settings, or cannot be written to.
        """
        folder = cls(Path(path))
        old = folder.path / "config.json"
        if old.is_file():
            if not resume:
                raise InputError(f"{path} already holds a run; give another folder, or --resume to go on with it")
            folder._sweep()
            before = _read_config(old)
            changed = [key for key in sorted({*before, *config}) if before.get(key) != config.get(key)]
            if changed:
                raise InputError(f"{path} was run with another {changed[0]}; resume with the same settings")
            return folder
        folder._sweep()
        if folder.path.is_dir() and any(folder.path.iterdir()):
            raise InputError(f"{path} is not empty and not a run folder; give a new or empty folder")
        make_folder(folder.path)
        write_whole(old, _json(config))
        return folder

    def _sweep(self) -> None:
        """Remove what a killed run was writing."""
        for left in self.path.glob(".*.partial"):
            left.unlink(missing_ok=True)

    def withdraw(self) -> None:
        """Take back a folder whose run found its input unusable before anything was kept."""
        if not self.path.is_dir() or self.state_file.is_file() or (self.path / "rows.jsonl").is_file():
            return
        (self.path / "config.json").unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "rows.parquet").is_file() and not self.state_file.is_file()

    @property
    def state_file(self) -> Path:
        """Where the state of a running measurement stands."""
        return self.path / "state.pt"

    def save_state(self, state: dict) -> None:
        """Write the state; the one before it stays until the new one is whole.

        Raises InputError when the disk does not take it.
        """
        try:
            with whole_file(self.state_file) as path:
                torch.save(state, path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            raise InputError(
                f"cannot save the state in {self.path}: {str(error).splitlines()[0]}; make room and go on with --resume"
            ) from error

    def load_state(self) -> dict | None:
        """The state of a stopped run; None when there is none. Raises InputError when the file is damaged."""
        if not self.state_file.is_file():
            return None
        try:
            return torch.load(self.state_file, weights_only=True)
        except Exception as error:
            raise InputError(f"{self.state_file} is damaged; remove it to start this run again") from error

    def write_rows(self, rows: list[Row]) -> None:
        """Rows so far, as JSON Lines."""
        write_whole(self.path / "rows.jsonl", "".join(to_line(row) for row in rows).encode())

    def finish(self, table: Table, environment: dict) -> None:
        """Write the final rows and the environment, and drop the state."""
        table.write(self.path)
        write_whole(self.path / "environment.json", _json(environment))
        self.state_file.unlink(missing_ok=True)


def environment(device: torch.device, notes: list[str], seconds: float) -> dict:
    """Versions, machine and settings that numbers can depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "notes": notes,
    }


def _read_config(file: Path) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged, so this run cannot go on; give another folder") from error
    return config if isinstance(config, dict) else {}


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()
