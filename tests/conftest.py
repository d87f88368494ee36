"""Fixtures that every part of the suite shares."""

import signal
import zlib
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job, where Ctrl-C would test nothing
    signal.signal(signal.SIGINT, signal.default_int_handler)

MATERIAL = Path(__file__).resolve().parents[1] / "material"


def require_material(name: str) -> Path:
    """The folder ``material/<name>``; the test that asks is skipped where that is not at hand."""
    folder = MATERIAL / name
    if not folder.is_dir():
        pytest.skip(f"{folder.relative_to(MATERIAL.parent)} is not at hand")
    return folder


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A CPU generator whose seed is the test's own, the same in every run; a failure shows the seed."""
    seed = zlib.crc32(request.node.nodeid.encode())
    request.node.add_report_section("call", "seed", f"generator seeded with {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def material(request: pytest.FixtureRequest) -> Path:
    """The folder ``material``, for tests that read real models or text.

    Ask for a subfolder by ``@pytest.mark.parametrize("material", ["models"], indirect=True)``.
    """
    require_material(getattr(request, "param", "."))
    return MATERIAL
