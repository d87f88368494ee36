"""The public names are what they say, in whatever order things are imported."""

import subprocess
import sys

import pytest

import transect as tx

CALLABLE = ("measure", "plan", "run", "write_report", "Row", "Table", "View", "InputError")


@pytest.mark.parametrize("name", CALLABLE)
def test_names_stay_callable_after_their_modules_are_imported(name: str):
    import transect.measure
    import transect.plan  # noqa: F401

    for _ in range(2):
        assert callable(getattr(tx, name))


def test_every_name_resolves_and_no_other_does():
    for name in dir(tx):
        assert getattr(tx, name) is not None
    with pytest.raises(AttributeError, match="'colour'"):
        _ = tx.colour


def test_importing_it_imports_nothing_heavy():
    heavy = ("torch", "transformers", "pandas", "pyarrow", "altair", "sklearn", "datasets")
    code = f"import sys, transect; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
