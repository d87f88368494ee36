"""The checkpoints of a training run: whole or not there, checked when read, on any number of processes."""

import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transect.errors import InputError
from transect.models import shards
from transect.models.damage import (
    Damaged,
    check_files,
    check_strangers,
    digest,
    read_manifest,
    whole_before,
    write_manifest,
)
from transect.models.saved import write_description
from transect.models.shards import Form, Piece
from transect.train.config import CheckpointConfig
from transect.train.exchange import Exchange, Peers
from transect.train.saved import model_state, optimizer_state, restore, room_for

_NAME = re.compile(r"step-([0-9]{8,})")
MODEL, OPTIMIZER = "state/model", "state/optimizer"


class HasParts(Protocol):
    """What is needed of an `Optimizer`."""

    parts: list[torch.optim.Optimizer]


class Checkpoints:
    """RUN/checkpoints, with a folder for each step: `step-00000120`.

    It holds config.json and the tokenizer, so that `View.load` and transformers load it as a model; state/model and
    state/optimizer, safetensors files in which each process has written its part of every tensor; and checkpoint.json:
    how far the run was, size and blake2b of every file. A folder has its name only when all of it is on the disk; until
    then it is `.step-00000120.partial`, which the next run removes. No file is a pickle. All processes make one, call
    the same methods in the same order, and must see the same folder.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, world: Peers) -> None:
        self.folder, self.config, self.world = folder, config, world
        self._exchange = Exchange(world)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        if world.is_main:
            _sweep(folder)
        self._exchange.all(None)

    def steps(self) -> list[int]:
        """The steps that were written to their end, in order; a damaged one counts, and is refused when it is read."""
        return sorted(_found(self.folder))

    def save(
        self, model: PreTrainedModel, optimizer: HasParts, progress: dict[str, Any], tokenizer: Any, wait: bool = True
    ) -> None:
        """Write a checkpoint of `progress["step"]`, then remove those that `keep_last` and `keep_at` do not keep.

        progress: what JSON can hold. wait: False returns as soon as the state is copied (on the CPU; memory of the
        size of the state) and a thread writes it; what it raises comes with the next call. Raises InputError when the
        disk does not take it; the checkpoints before stay as they are.
        """
        self.finish()
        step, main = progress["step"], self.world.is_main
        own = {MODEL: self._pieces(model_state(model))}
        own[OPTIMIZER] = self._pieces(optimizer_state(model, optimizer.parts))
        record = {"step": step, "progress": progress, "optimizers": _kinds(optimizer)}
        partial = self.folder / f".{_name(step)}.partial"
        refused = _attempt(lambda: write_description(partial, model, tokenizer)) if main else None
        if wait:
            self._write(record, own, refused)
            return
        own = {kind: shards.copied(piece) for kind, piece in own.items()}
        self._thread = threading.Thread(target=self._write_later, args=(record, own, refused))
        self._thread.start()

    def finish(self) -> None:
        """Wait for what is being written; raises what went wrong with it, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def load(self, step: int, model: PreTrainedModel, optimizer: HasParts) -> dict[str, Any]:
        """Give model and optimizer the state they had at a step, to the bit; the progress saved with it.

        Raises InputError for a step that is not there, for another model or optimizer, and for a damaged checkpoint: it
        names the file and the step before that can be asked for. Cost: every file is read twice, once for its checksum.
        """
        self.finish()
        if step not in (known := _found(self.folder)):
            told = f"there are {', '.join(map(str, sorted(known)))}" if known else "there are none"
            raise InputError(f"no checkpoint of step {step} in {self.folder}; {told}")
        folder = known[step]
        record = self._checked(folder)
        if record["optimizers"] != _kinds(optimizer):
            before, now = ", ".join(record["optimizers"]), ", ".join(_kinds(optimizer))
            raise InputError(f"{folder} was written with optimizer {before}, this run has {now}; use the same recipe")
        state, saved = model_state(model), shards.forms(folder / OPTIMIZER)
        _check_fit(folder, state, shards.forms(folder / MODEL))
        try:
            room = room_for(model, optimizer.parts, saved)
        except KeyError as error:
            raise InputError(
                f"{folder} has optimizer state of {error}, this run has not; use the same recipe"
            ) from error
        shards.read(folder / MODEL, state)
        shards.read(folder / OPTIMIZER, room)
        restore(model, optimizer.parts, room)
        return record["progress"]

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, for a run that goes on from this one."""
        if self.world.is_main:
            for later, folder in _found(self.folder).items():
                if later > step:
                    shutil.rmtree(folder)
        self._exchange.all(None)

    def _pieces(self, state: Mapping[str, Tensor]) -> dict[str, Piece]:
        """What this process writes: no tensor's part that one of lower rank has too, as copies of a mesh do."""
        own = shards.pieces(state, self.world.is_main)
        held = {name: piece.offsets for name, piece in own.items() if piece.elsewhere}
        written = [claimed.items() for claimed in self._exchange.all(held)[: self.world.rank]]
        double = {name for name, at in held.items() if any((name, at) in items for items in written)}
        return {name: piece for name, piece in own.items() if name not in double}

    def _checked(self, folder: Path) -> dict[str, Any]:
        """What checkpoint.json says; each process reads a part of the files, and all raise what one of them found."""
        record: dict[str, Any] = {}
        found: InputError | None = None
        try:
            record = read_manifest(folder)
            check_strangers(folder, record)
            check_files(folder, record, sorted(record["files"])[self.world.rank :: self.world.size])
        except InputError as error:
            found = error
        first = next(
            (error for error in self._exchange.all(found and (str(found), isinstance(found, Damaged))) if error), None
        )
        if first is None:
            return record
        message, damaged = first
        if not damaged:
            raise InputError(message)
        before = self._exchange.all(whole_before(folder) if self.world.is_main else None)[0]
        advice = "no step before it is whole" if before is None else f"go on with --resume-from {int(before.name[5:])}"
        raise InputError(f"{message}; {advice}") from found

    def _write_later(self, *what: Any) -> None:
        try:
            self._write(*what)
        except Exception as error:
            self._failure = error

    def _write(self, record: dict[str, Any], own: Mapping[str, Mapping[str, Piece]], failure: Exception | None) -> None:
        """Write this process' files; the main one then makes the checkpoint of all of them, if none failed."""
        world, step = self.world, record["step"]
        partial = self.folder / f".{_name(step)}.partial"
        written: dict[str, Any] = {}

        def write() -> None:
            for kind, pieces in own.items():
                if pieces:
                    name = f"{kind}/{world.rank:05d}-of-{world.size:05d}.safetensors"
                    written[name] = shards.write(partial / name, pieces)

        failure = failure or _attempt(write)
        told = self._exchange.all((written, _reason(failure)))
        why = next((reason for _, reason in told if reason), None)
        if why is None:
            if world.is_main:
                files = {name: mark for files, _ in told for name, mark in files.items()}
                failure = _attempt(lambda: self._commit(partial, record, files))
            why = self._exchange.all(_reason(failure))[0]
        if why is None:
            return
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        if failure is not None and not isinstance(failure, OSError):
            raise failure
        raise InputError(
            f"cannot save the checkpoint of step {step} in {self.folder}: {why}; make room and go on with --resume"
        ) from failure

    def _commit(self, partial: Path, record: dict[str, Any], files: dict[str, Any]) -> None:
        """Give the finished folder its name, then remove older ones. Raises OSError."""
        for name, mark in files.items():
            if not (partial / name).is_file() or (partial / name).stat().st_size != mark["size"]:
                raise OSError(f"{name} is not there; all processes must write into the same folder")
        for path in sorted(partial.iterdir()):
            if path.is_file():
                _sync(path)
                files[path.name] = digest(path)
        write_manifest(partial, {**record, "processes": self.world.size, "files": files})
        for path in (*partial.glob("state/*"), partial / "state", partial):
            _sync(path)
        target = self.folder / _name(record["step"])
        replaced = self.folder / f".{target.name}.replaced"
        if target.exists():
            os.replace(target, replaced)
        os.replace(partial, target)
        _sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(record["step"])

    def _prune(self, newest: int) -> None:
        """Remove older ones; those of later steps, left by a run that went further, are not counted."""
        known = {step: path for step, path in _found(self.folder).items() if step <= newest}
        kept = {*sorted(known)[-self.config.keep_last :], *self.config.keep_at}
        for step in known.keys() - kept:
            gone = self.folder / f".{known[step].name}.partial"  # so that a stop in between leaves no damaged one
            with suppress(OSError):
                os.replace(known[step], gone)
                shutil.rmtree(gone)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _found(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in named if match}


def _sweep(folder: Path) -> None:
    """Remove what a killed run was writing; a checkpoint that it was replacing takes its name back."""
    for left in folder.glob(".step-*.replaced"):
        target = folder / left.name[1:].removesuffix(".replaced")
        if target.exists():
            shutil.rmtree(left)
        else:
            os.replace(left, target)
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _attempt(action: Callable[[], None]) -> Exception | None:
    """What an action raised, so that the other processes can be told before anyone stops."""
    try:
        action()
    except Exception as error:
        return error
    return None


def _reason(error: Exception | None) -> str | None:
    if error is None:
        return None
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__


def _kinds(optimizer: HasParts) -> list[str]:
    return [type(part).__name__ for part in optimizer.parts]


def _check_fit(folder: Path, state: Mapping[str, Tensor], saved: Mapping[str, Form]) -> None:
    """Raise InputError with the first weight that model and checkpoint do not have in the same form."""
    for name in sorted({*state, *saved}):
        tensor = state.get(name)
        here = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        there = saved.get(name)
        if here != there:
            shown = [f"{list(form[0])} {form[1]}" if form else "not there" for form in (there, here)]
            raise InputError(
                f"{folder} is of another model: {name} is {shown[0]}, here {shown[1]}; use the same recipe"
            )
