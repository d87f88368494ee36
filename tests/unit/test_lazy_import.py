"""Nothing heavy is imported before it is needed, and the public names are there all the same."""

import subprocess
import sys

import pytest

import transect as tx
from shell import ENVIRONMENT

HEAVY = ("torch", "transformers", "pandas", "pyarrow", "altair", "sklearn", "datasets", "scipy", "numpy")
REPORT = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
MAIN = """
import sys
sys.argv = ["transect", *{arguments}]
from transect.cli import main
try:
    main()
except SystemExit as leaving:
    assert leaving.code == {code}, leaving.code
"""


def _imported(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    return done.stdout.splitlines()[-1]


def test_importing_the_package_is_light():
    assert _imported("import transect") == "[]"


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), ([], 0), (["measure", "--help"], 0), (["measure"], 2), (["sow"], 2)]
)
def test_help_and_mistyped_commands_are_light(arguments: list[str], code: int):
    assert _imported(MAIN.format(arguments=arguments, code=code)) == "[]"


def test_a_name_of_the_package_brings_what_it_needs_and_no_more():
    assert _imported("import transect; transect.Table") == "[]"
    assert "torch" in _imported("import transect; transect.View")


def test_public_names():
    assert tx.View.__name__ == "View"
    assert tx.measure.__module__ == "transect.measure" and callable(tx.measure)
    assert tx.data.from_tokens([[1, 2]]).num_tokens == 2
    assert callable(tx.edits.swap)
    assert tx.probes.Nonlinearity().name == "nonlinearity"
    assert len(tx.Table()) == 0
    assert issubclass(tx.InputError, ValueError)


@pytest.mark.parametrize("owner", [tx, tx.probes])
def test_other_names_do_not_exist(owner: object):
    with pytest.raises(AttributeError, match="Colour"):
        owner.Colour  # noqa: B018
