"""What docs/write_a_recipe.md shows runs, and prints what it says."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from shell import command
from transect.recipes.reading import documents
from transect.recipes.recipe import load

PAGE = (Path(__file__).parents[2] / "docs/write_a_recipe.md").read_text()


def fences(language: str) -> list[str]:
    """The code blocks of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.S | re.M)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my-cea.yaml").write_text(fences("yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_is_shown_as_printed(folder: Path):
    said = [line.rstrip() for line in command("show", "my-cea.yaml").out.splitlines()]
    wanted = [line.rstrip() for line in fences("text")[0].splitlines() if line.strip()]
    assert [line for line in said if line in wanted] == wanted, "\n".join(said)


def test_the_line_of_a_wrong_setting_is_the_real_one(folder: Path):
    (line,) = re.findall(r"`(recipe my-cea\.yaml: .*?)`", PAGE)
    refused = command("show", "my-cea.yaml", "--set", "model.block={kind: caa, outer_ratio: 1.5}")
    assert refused.code == 2 and refused.err == f"transect: {line}\n"


def test_the_grid_is_read(folder: Path):
    (folder / "grid.yaml").write_text(fences("yaml")[1])
    found = documents(folder / "grid.yaml")
    assert [one["name"] for one in found] == [f"my-sparse-{s}-g{g}" for s in ("avg_k", "switch") for g in (64, 16)]
    for one in found:
        (folder / "one.yaml").write_text(json.dumps(one))
        ffn = load(folder / "one.yaml").model.ffn
        assert f"my-sparse-{ffn.selector.kind}-g{ffn.block_size}" == one["name"]


def test_the_python_prints_what_it_says(folder: Path):
    said = StringIO()
    with redirect_stdout(said):
        exec(compile(fences("python")[0], "write_a_recipe.md", "exec"), {})
    assert said.getvalue() == fences("text")[1]
