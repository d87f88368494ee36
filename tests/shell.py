"""The command line as a user has it: in this process for speed, or as a process of its own."""

import functools
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from families import FIRST_TEXT_ID, VOCAB, tiny_model

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}


@dataclass(frozen=True)
class Outcome:
    """What a command left behind: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> Outcome:
    """`transect` with these arguments, in this process, at 80 columns."""
    from transect.cli import main

    out, err, code = StringIO(), StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["transect", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"COLUMNS": "80"}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
    return Outcome(code, out.getvalue(), err.getvalue())


def process(*arguments: object) -> Outcome:
    """`python -m transect` with these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "transect", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@functools.cache
def _model(name: str, seed: int) -> torch.nn.Module:
    return tiny_model(name, seed=seed)


def saved_model(folder: Path, name: str = "gpt2", seed: int = 0) -> Path:
    """A tiny model without a tokenizer, as a model folder."""
    _model(name, seed).save_pretrained(folder)
    return folder


def saved_tokens(file: Path, documents: int = 61, length: int = 23) -> Path:
    """Random documents of one length as a .npy file."""
    np.save(file, np.random.default_rng(3).integers(FIRST_TEXT_ID, VOCAB, (documents, length)))
    return file


def contents(folder: Path) -> set[str]:
    """The names of all files in a folder, hidden ones too; none where there is no folder."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
