"""Memory does not grow with the text."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from families import FAMILIES, FIRST_TEXT_ID, VOCAB
from shell import ENVIRONMENT

DRIVER = """
import resource, sys
from transect.cli import main
model, *texts = sys.argv[1:]
for tokens in texts:
    sys.argv = ["transect", "measure", model, "--tokens", tokens, "--seq-len", "61"]
    try:
        main()
    except SystemExit as leaving:
        assert leaving.code == 0, leaving.code
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
"""One process for all texts: from process to process, what imports leave in memory differs by a tenth."""
SEQ_LEN = 61
DOCUMENTS = 211


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose sums take tens of megabytes."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"n_embd": 64, "n_inner": 251}
    AutoModelForCausalLM.from_config(FAMILIES["gpt2"].but(**sizes)(4)).save_pretrained(folder)
    return folder


def _text(sequences: int, folder: Path) -> Path:
    """Documents of so many sequences each; their number, over which errors are computed, stays."""
    file = folder / f"{sequences}.npy"
    np.save(file, np.random.default_rng(0).integers(FIRST_TEXT_ID, VOCAB, (DOCUMENTS, sequences * SEQ_LEN)))
    return file


def test_four_times_the_text_takes_no_more_memory(model: Path, tmp_path: Path):
    texts = [str(_text(sequences, tmp_path)) for sequences in (1, 1, 4)]  # the first fills the allocator
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(model), *texts],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, short, long = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak "))
    assert long <= 1.03 * short, (short, long)
