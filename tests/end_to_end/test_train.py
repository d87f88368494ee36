"""Training runs: every family trains, the loss falls, rows and seeds are right, probes inside equal probes after."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import transect as tx
from corpora import small_corpus
from transect.data.corpus import Corpus
from transect.data.of_corpus import from_corpus
from transect.recipes.recipe import Recipe, load
from transect.results import Table
from transect.train.run import Outcome, train

FAMILIES = (
    "tiny-gpt-small-vanilla",
    "tiny-gpt-small-wider",
    "tiny-gpt-small-cea",
    "tiny-bert-small-vanilla",
    "tiny-bert-small-cea",
    "tiny-bert-base-attention-only",
    "tiny-bert-6x512-learned-skip",
    "tiny-llama-10m",
    "tiny-llama-10m-jreg",
    "tiny-sparse-avg_k",
    "tiny-sparse-switch",
    "tiny-sparse-rand_hash",
    "tiny-sparse-random_router",
    "tiny-sparse-top_k",
    "tiny-sparse-bias_balanced",
    "tiny-sparse-vanilla_m",
    "tiny-sparse-lorkm",
    "tiny-sparse-pkm",
    "tiny-sparse-pkm_ffn",
    "tiny-moe-14b-cea",
)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> dict[str, Corpus]:
    folder = tmp_path_factory.mktemp("corpora")
    kinds = {"causal": "characters", "masked": "wordpiece"}
    return {objective: small_corpus(folder / objective, kind) for objective, kind in kinds.items()}


def recipe_of(name: str, corpora: dict[str, Corpus], *changes: str) -> Recipe:
    corpus = corpora[load(name).model.objective]
    fixed = [f"data.path={corpus.path}", f"model.vocab_size={corpus.card.vocab_size}", "model.pad_token_id=null"]
    return load(name, [*fixed, "data.seq_len=24", "train.log_every=1", "train.checkpoints.every=null", *changes])


def losses(table: Table, part: str = "total") -> list[float | None]:
    return [row.value for row in table.where(probe="train", metric="loss", part=part)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains(name: str, corpora, tmp_path: Path):
    changes = ["train.steps=23", "train.batch_size=8", "train.optimizer={kind: adamw, lr: 0.01}"]
    changes += ["train.schedule={kind: constant, warmup: 3}", "model.dropout=0"]
    outcome = train(recipe_of(name, corpora, *changes), tmp_path / "run")
    found = losses(outcome.table, "main")
    assert outcome.reason == "steps" and len(found) == 23 and None not in found
    assert sum(found[-4:]) / 4 < sum(found[:2]) / 2 - 0.2
    valid = outcome.table.where(metric="nats_per_token", split="valid")
    assert valid.rows[0].step == 0 and valid.rows[-1].step == 23
    assert valid.rows[-1].value < valid.rows[0].value - 0.2


def test_what_a_run_leaves(corpora, tmp_path: Path):
    recipe = recipe_of("tiny-sparse-switch", corpora, "train.steps=7", "train.evaluation.every=3")
    outcome = train(recipe, tmp_path / "run")
    written = Table.read(tmp_path / "run")
    assert written.rows == outcome.table.rows
    assert load(tmp_path / "run/recipe.yaml") == recipe
    train_rows = outcome.table.where(probe="train")
    assert {row.step for row in train_rows} == set(range(1, 8))
    assert {row.metric for row in train_rows} >= {
        "loss", "gradient_norm", "learning_rate", "stream_norm", "skipped_steps", "tokens_per_second", "mfu",
        "peak_memory", "entropy", "dead_fraction", "largest_load", "drop_fraction",
    }  # fmt: skip
    mfu = train_rows.where(metric="mfu").rows[0]
    assert mfu.value is None and mfu.reason
    total = {row.step: row.value for row in train_rows.where(metric="loss", part="total")}
    parts = [row for row in train_rows.where(metric="loss") if row.part != "total"]
    for step, value in total.items():
        assert math.isclose(sum(row.value for row in parts if row.step == step), value, rel_tol=1e-12)
    evaluated = outcome.table.where(task="language_modelling")
    assert {row.step for row in evaluated} == {0, 3, 6, 7}
    assert {(row.split, row.domain) for row in evaluated} == {("valid", "words"), ("ood", "short")}
    last = [row for row in evaluated if row.step == 7 and row.metric == "bits_per_byte" and row.split == "valid"]
    assert last[0].stderr is not None and last[0].low < last[0].value < last[0].high
    assert {row.tokens for row in train_rows if row.step == 7} == {7 * recipe.train.batch_size * 24}
    assert (tmp_path / "run/events").is_dir()


def test_evaluation_equals_the_model_on_its_checkpoint(corpora, tmp_path: Path):
    recipe = recipe_of("tiny-llama-10m", corpora, "train.steps=5", "train.evaluation.tokens=null")
    table = train(recipe, tmp_path / "run").table
    view = tx.View.load(tmp_path / "run")
    part = corpora["causal"].part("valid", "words")
    nats, count = 0.0, 0
    for start, end in zip(part.offsets[:-1], part.offsets[1:], strict=True):
        ids = torch.from_numpy(part.read(int(start), int(end - start) - 1))
        ids = torch.cat([torch.tensor([corpora["causal"].card.end_id]), ids])
        for at in range(0, len(ids) - 1, 23):
            window = ids[at : at + 24]
            with torch.no_grad():
                scores = view.model(window[None]).logits[0, :-1].double().log_softmax(-1)
            nats -= float(scores.gather(1, window[1:, None]).sum())
            count += len(window) - 1
    row = table.where(metric="nats_per_token", split="valid", step=5).rows[0]
    assert row.n == count == part.tokens - part.documents
    assert math.isclose(row.value, nats / count, rel_tol=1e-5)
    bits = table.where(metric="bits_per_byte", split="valid", step=5).rows[0]
    assert math.isclose(bits.value, nats / math.log(2) / int(part.bytes.sum()), rel_tol=1e-5)


def test_the_same_seed_gives_the_same_run_and_another_does_not(corpora, tmp_path: Path):
    def run(name: str, seed: int) -> Outcome:
        changes = ["train.steps=5", f"train.seed={seed}", "model.dropout=0.1"]
        return train(recipe_of("tiny-gpt-small-vanilla", corpora, *changes), tmp_path / name)

    first, again, other = run("a", 3), run("b", 3), run("c", 4)
    assert losses(first.table) == losses(again.table)
    assert all(one != two for one, two in zip(losses(first.table), losses(other.table), strict=True))


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["tiny-llama-10m-jreg", "tiny-bert-small-vanilla", "tiny-sparse-avg_k"])
def test_micro_batches_change_nothing_but_rounding(name: str, precision: str, corpora, tmp_path: Path):
    changes = ["train.steps=4", "train.batch_size=6", f"train.precision={precision}", "model.dropout=0"]
    changes += ["model.attention.dropout=0", "train.z_loss=0.01"]
    found = [
        losses(train(recipe_of(name, corpora, *changes, f"train.micro_batch={size}"), tmp_path / str(size)).table)
        for size in (6, 2, 1)
    ]
    bound = 1e-9 if precision == "float64" else 1e-4
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), rtol=bound, atol=0)


@pytest.mark.parametrize("name", ["tiny-llama-10m-jreg", "tiny-sparse-top_k", "tiny-bert-small-cea"])
def test_bfloat16_products_change_little(name: str, corpora, tmp_path: Path):
    def run(precision: str) -> torch.Tensor:
        changes = ["train.steps=9", f"train.precision={precision}", "model.dropout=0", "train.optimizer.lr=0.003"]
        recipe = recipe_of(name, corpora, *changes, "model.attention.dropout=0")
        outcome = train(recipe, tmp_path / precision)
        (file,) = (tmp_path / precision / "checkpoints/step-00000009/state/model").glob("*.safetensors")
        assert {weight.dtype for weight in load_file(file).values()} == {torch.float32}
        return torch.tensor(losses(outcome.table))

    exact, rounded = run("float32"), run("bfloat16")
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("mode", ["layer", "cheap"])
def test_recomputing_changes_nothing(mode: str, corpora, tmp_path: Path):
    def run(name: str, recompute: str) -> list[float | None]:
        changes = ["train.steps=4", f"train.recompute={recompute}", "model.dropout=0.1"]
        return losses(train(recipe_of("tiny-sparse-switch", corpora, *changes), tmp_path / name).table)

    assert run("plain", "none") == run("again", mode)


@pytest.mark.parametrize("name", ["tiny-llama-10m", "tiny-bert-small-vanilla"])
def test_a_probe_inside_equals_the_probe_afterwards(name: str, corpora, tmp_path: Path):
    probes = "train.probes=[{probe: jump, every: 3, tokens: 500}, {probe: similarity, every: 3, tokens: 500}]"
    kept = ["train.steps=6", "train.checkpoints={every: 3, keep_last: 3}"]
    recipe = recipe_of(name, corpora, probes, *kept)
    inside = train(recipe, tmp_path / "run").table
    text = from_corpus(corpora[recipe.model.objective], "valid", None, recipe.data, recipe.model, 500)
    for step in (3, 6):
        view = tx.View.load(tmp_path / "run", f"step-{step:08d}")
        for probe in ("jump", "similarity"):
            after = tx.measure(view, [probe], text, seed=recipe.train.seed)
            before = inside.where(probe=probe, step=step)
            assert len(before) == len(after) > 0
            for one, two in zip(before, after, strict=True):
                assert (one.metric, one.layer, one.variant) == (two.metric, two.layer, two.variant)
                assert one.value == two.value and one.stderr == two.stderr


def test_a_target_loss_ends_the_run(corpora, tmp_path: Path):
    changes = ["train.steps=500", "train.target_loss=2.9", "train.evaluation.every=2", "train.optimizer.lr=0.01"]
    outcome = train(recipe_of("tiny-llama-10m", corpora, *changes, "train.schedule.kind=constant"), tmp_path / "run")
    assert outcome.reason == "target_loss" and outcome.progress.step < 500 and outcome.progress.loss <= 2.9
    assert tx.View.load(tmp_path / "run").revision == f"step-{outcome.progress.step:08d}"


def test_a_time_budget_ends_the_run_and_more_time_goes_on(corpora, tmp_path: Path):
    recipe = recipe_of("tiny-llama-10m", corpora, "train.steps=6", "train.max_minutes=0.000001")
    outcome = train(recipe, tmp_path / "run")
    assert outcome.reason == "max_minutes" and outcome.progress.step == 1
    more = load(tmp_path / "run/recipe.yaml", ["train.max_minutes=null"])
    outcome = train(more, tmp_path / "run", resume=True)
    whole = train(recipe_of("tiny-llama-10m", corpora, "train.steps=6"), tmp_path / "whole")
    assert outcome.reason == "steps" and losses(outcome.table) == losses(whole.table)
