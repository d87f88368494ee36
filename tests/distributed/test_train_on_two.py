"""The whole loop on two processes gives the numbers of one process, also when it is stopped and gone on with."""

from collections.abc import Callable
from pathlib import Path

import pytest
from _spawn import spawn

from corpora import small_corpus
from transect.recipes.recipe import Recipe, load
from transect.results import Table
from transect.train.run import train

pytestmark = pytest.mark.xdist_group("processes")
STEPS = 9


def recipe_of(name: str, folder: Path, *changes: str) -> Recipe:
    corpus = small_corpus(folder)
    fixed = [f"data.path={corpus.path}", f"model.vocab_size={corpus.card.vocab_size}", "data.seq_len=24"]
    fixed += ["model.dropout=0", f"train.steps={STEPS}", "train.batch_size=8", "train.log_every=1"]
    fixed += ["train.precision=float64", "train.micro_batch=2", "train.evaluation={every: 4, tokens: 700}"]
    return load(name, [*fixed, "train.checkpoints={every: 3, keep_last: 5}", *changes])


def numbers(folder: Path) -> dict[tuple, float]:
    """Losses, norms, evaluation and probes by what they are, without what depends on the machine."""
    skipped = ("tokens_per_second", "peak_memory", "mfu")
    words = ("step", "probe", "metric", "part", "layer", "layer_to", "split", "domain", "variant", "site", "element")
    found = {}
    for row in Table.read(folder):
        if row.metric not in skipped:
            found[tuple(getattr(row, word) for word in words)] = row.value
    return found


def alike(first: Path, second: Path, bound: float) -> None:
    one, two = numbers(first), numbers(second)
    assert one.keys() == two.keys() and len(one) > 10 * STEPS
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=bound, abs=bound), name


def run(recipe: str, folder: str) -> str:
    return train(load(recipe), folder, device="cpu").reason


def on_two(work: Callable, recipe: Path, folder: Path, *given: object) -> None:
    reasons = spawn(work, 2, folder.with_name("spawned"), str(recipe), str(folder), *given, as_torchrun=True)
    assert reasons == ["stopped" if given else "steps"] * 2


def some_steps(recipe: str, folder: str, steps: int) -> str:
    """Stops, as if by Ctrl-C, after so many steps."""
    from transect.train import run as running

    class Halted(running.Run):
        def _after(self, done, stopped):
            return super()._after(done, lambda: self.progress.step >= steps)

    running.Run = Halted
    outcome = train(load(recipe), folder, device="cpu")
    assert outcome.progress.step == steps
    return outcome.reason


@pytest.mark.parametrize("name", ["tiny-llama-10m-jreg", "tiny-sparse-bias_balanced"])
def test_two_processes_are_one(name: str, tmp_path: Path):
    probes = "train.probes=[{probe: jump, every: 4, tokens: 300}]"
    recipe = recipe_of(name, tmp_path, probes)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    train(recipe, tmp_path / "one")
    on_two(run, file, tmp_path / "two")
    alike(tmp_path / "one", tmp_path / "two", 1e-9)


def test_stopped_on_two_and_gone_on_with_on_one_and_back(tmp_path: Path):
    recipe = recipe_of("tiny-llama-10m", tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    train(recipe, tmp_path / "one")
    on_two(some_steps, file, tmp_path / "changing", 5)
    assert train(recipe, tmp_path / "changing", resume=True).reason == "steps"
    alike(tmp_path / "one", tmp_path / "changing", 1e-9)


def test_experts_on_two(tmp_path: Path):
    recipe = recipe_of("tiny-sparse-top_k", tmp_path, "parallel.expert=2")
    alone = tmp_path / "alone.yaml"
    alone.write_text(recipe.but(parallel={}).to_yaml())
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    train(load(alone), tmp_path / "one")
    on_two(run, file, tmp_path / "two")
    alike(tmp_path / "one", tmp_path / "two", 1e-9)
