"""Tasks of lm-evaluation-harness on a view: its numbers as rows, and our data sets there, scored alike by both."""

import json
import logging
import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import transect as tx
from harness_setup import hf_model, hflm, tokenizer, without_network
from prepared import WORDS, texts
from transect import harness
from transect.errors import InputError, NotAtHand
from transect.results import Row
from transect.tasks.base import Subject, Task
from transect.tasks.cloze import Cloze
from transect.tasks.minimal_pairs import MinimalPairs
from transect.tasks.options import Options
from transect.view.view import View

ITEMS = 29
HEAD = {"description": "For a test.", "source": "Ours."}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.evaluator

    without_network(tmp_path, monkeypatch)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # five seconds for nothing


@pytest.fixture(scope="module")
def view() -> View:
    return View(hf_model(), tokenizer())


def written(folder: Path, kind: str, layout: dict, records: dict[str, list[dict]], **more: object) -> str:
    """A data set of our own kind; the command line's word for it."""
    for split, rows in records.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: [str(folder / f"{split}.jsonl")] for split in records}
    (folder / f"{kind}.yaml").write_text(
        yaml.safe_dump(HEAD | {"kind": kind, "files": files, "layouts": [layout]} | more)
    )
    return f"{kind}:{folder / f'{kind}.yaml'}"


def options_set(folder: Path) -> str:
    """Questions of two to four options, some with a context that ends in a blank or that is empty."""
    rng = random.Random(3)
    rows = []
    for number, text in enumerate(texts(ITEMS + 7, words=7)):
        options = [" ".join(rng.sample(WORDS, rng.randint(1, 4))) for _ in range(2 + number % 3)]
        rows.append({"text": text, "options": options, "gold": rng.randrange(len(options))})
    layout = {"context": "{{ text }}\nAnswer:", "options": "options", "gold": "gold"}
    return written(folder, "options", layout, {"test": rows[:ITEMS], "train": rows[ITEMS:]})


def contexts_set(folder: Path) -> str:
    rng = random.Random(5)
    rows = [{"names": rng.sample(WORDS, 2), "rest": text, "gold": rng.randrange(2)} for text in texts(ITEMS, words=3)]
    layout = {"contexts": "['The ' ~ names[0], 'The ' ~ names[1]]", "options": "[rest]", "gold": "gold"}
    return written(folder, "options", layout, {"test": rows})


def cloze_set(folder: Path) -> str:
    return written(folder, "cloze", {"text": "{{ text }}"}, {"test": [{"text": one} for one in texts(ITEMS, words=6)]})


def pairs_set(folder: Path) -> str:
    for name, seed in (("one", 1), ("two", 2)):
        rows = [{"a": a, "b": b} for a, b in zip(texts(ITEMS, seed, 5), texts(ITEMS, seed + 9, 4), strict=True)]
        (folder / f"pairs_{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows[: ITEMS - 10 * seed])
        )
    layout = {"good": "{{ a }}", "bad": "{{ b }}"}
    made = {"kind": "minimal_pairs", "files": {"test": ["pairs_*.jsonl"]}, "several": True}
    (folder / "pairs.yaml").write_text(yaml.safe_dump(HEAD | made | {"layouts": [layout]}))
    return f"minimal_pairs:{folder / 'pairs.yaml'}"


def evaluated(model: object, name: str, folder: Path, **more: object) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=model, tasks=[name], task_manager=manager, bootstrap_iters=10, **more)


def rows_by(rows: list[Row]) -> dict[tuple, Row]:
    return {(row.domain, row.variant): row for row in rows}


def own(view: View, task: Task, folders: tuple[Path, ...] = ()) -> dict[tuple, float | None]:
    return {(row.metric, row.part, row.variant): row.value for row in task.rows(Subject(view=view, folders=folders))}


@pytest.mark.parametrize("made", [options_set, contexts_set, cloze_set, pairs_set], ids=lambda made: made.__name__)
def test_an_exported_set_is_scored_alike_by_hflm_and_by_us(view, tmp_path, made: Callable[[Path], str]):
    name = harness.export(made(tmp_path), tmp_path / "out", folders=[tmp_path])
    golden = evaluated(hflm(view.model, view.tokenizer), name, tmp_path / "out")["results"]
    ours = evaluated(harness.model(view), name, tmp_path / "out")["results"]
    assert list(ours) == list(golden)
    for task, values in golden.items():
        numbers = {key: value for key, value in values.items() if isinstance(value, float)}
        assert numbers and {key: ours[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-6)


def test_rows_of_run_are_those_of_our_own_option_scoring(view, tmp_path):
    data = options_set(tmp_path)
    name = harness.export(data, tmp_path / "out")
    found = rows_by(harness.run(view, [name], include_path=tmp_path / "out"))
    mine = own(view, Options(data=data.removeprefix("options:")))
    plain, normed = found[name, "0-shot: acc,none"], found[name, "0-shot: acc_norm,none"]
    assert plain.value == mine["accuracy", None, "0-shot: option"]
    assert normed.value == mine["accuracy", None, "0-shot: option per character"] != plain.value
    assert 0 < plain.value < 1
    assert (plain.task, plain.metric, normed.metric, plain.unit) == ("lm_eval", "accuracy", "accuracy", "1")
    assert (plain.n, plain.split, plain.reason) == (ITEMS, "test", None)
    error = math.sqrt(plain.value * (1 - plain.value) / (ITEMS - 1))
    assert (plain.stderr, plain.low, plain.high) == pytest.approx(
        (error, plain.value - 1.96 * error, plain.value + 1.96 * error)
    )


def test_shots_and_limit_are_those_of_our_own_task(view, tmp_path):
    data = options_set(tmp_path)
    plain = harness.export(data, tmp_path / "out", limit=17)
    name = harness.export(data, tmp_path / "out", shots=2, limit=17)
    assert name == "transect_options_2shot" and plain == "transect_options"
    found = rows_by(harness.run(view, [name, plain], include_path=tmp_path / "out", num_fewshot=5))
    for shots, one in ((2, name), (0, plain)):
        task = Options(data=data.removeprefix("options:"), shots=shots, order="first", limit=17)
        row = found[one, "0-shot: acc,none"]
        assert row.value == own(view, task)["accuracy", None, f"{shots}-shot: option"]
        assert row.n == 17
    first, second = (
        [json.loads(line) for line in (tmp_path / "out" / f"{one}.jsonl").read_text().splitlines()]
        for one in (name, plain)
    )
    assert all(a["context"].endswith("\n\n" + b["context"]) for a, b in zip(first, second, strict=True))


def test_an_item_is_never_its_own_example(tmp_path):
    data = options_set(tmp_path)
    name = harness.export(data, tmp_path / "out", shots=1, split="train")
    rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    question = rows[1]["context"].split("\n\n")[1]
    assert rows[0]["context"].split("\n\n")[1] not in rows[0]["context"].split("\n\n")[0]
    assert all(question not in row["context"].split("\n\n")[0] for row in rows[1:])
    with pytest.raises(InputError, match="only 6 other examples"):
        harness.export(data, tmp_path / "out", shots=7, split="train")


def test_cloze_and_pairs_are_those_of_our_own_tasks(view, tmp_path):
    data = cloze_set(tmp_path)
    name = harness.export(data, tmp_path / "cloze")
    found = rows_by(harness.run(view, [name], include_path=tmp_path / "cloze"))
    mine = own(view, Cloze(data=data.removeprefix("cloze:")))
    assert found[name, "0-shot: acc,none"].value == mine["accuracy", None, "greedy"]
    perplexity = found[name, "0-shot: perplexity,none"]
    assert perplexity.value == pytest.approx(mine["perplexity", None, None]) and perplexity.metric == "perplexity"
    assert perplexity.stderr is not None and perplexity.stderr > 0
    data = pairs_set(tmp_path)
    name = harness.export(data, tmp_path / "pairs", folders=[str(tmp_path)])
    found = rows_by(harness.run(view, [name], include_path=tmp_path / "pairs"))
    mine = own(view, MinimalPairs(data=data.removeprefix("minimal_pairs:")), (tmp_path,))
    whole = found[name, "0-shot: acc,none"]
    assert whole.value == pytest.approx(mine["accuracy", None, "whole"]) and whole.n == ITEMS - 10 + ITEMS - 20
    for part in ("pairs_one", "pairs_two"):
        assert found[f"{name}_{part}", "0-shot: acc,none"].value == mine["accuracy", part, "whole"]


def test_mixed_blanks_and_differing_pairs(view, tmp_path):
    rows = [
        {"contexts": ["Oak", ""], "options": ["elm", "fir"], "gold": 0},
        {"contexts": ["Yew ", "Yew "], "options": ["elm", "fir"], "gold": 1},
    ]
    layout = {"contexts": "contexts", "options": "options", "gold": "gold"}
    data = written(tmp_path, "options", layout, {"test": rows})
    with pytest.raises(InputError, match="contexts and continuations of their own"):
        harness.export(data, tmp_path / "out")
    rows[0]["contexts"] = ["Oak", "Oak"]
    name = harness.export(written(tmp_path, "options", layout, {"test": rows}), tmp_path / "out")
    config = yaml.safe_load((tmp_path / "out" / f"{name}.yaml").read_text())
    lines = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
    assert config["target_delimiter"] == ""
    assert [json.loads(line)["options"] for line in lines] == [[" elm", " fir"], ["elm", "fir"]]


def test_what_cannot_be_exported(tmp_path):
    for data, words in (
        ("hellaswag", "KIND:DATA"),
        ("labelled:snli", "KIND:DATA"),
        ("options:none", "unknown data set"),
    ):
        with pytest.raises(InputError, match=words):
            harness.export(data, tmp_path)
    with pytest.raises(InputError, match="only sets of options"):
        harness.export("cloze:last_word", tmp_path, shots=1)
    with pytest.raises(NotAtHand, match="hellaswag is not at hand"):
        harness.export("options:hellaswag", tmp_path)
    assert not list(tmp_path.iterdir())


# tasks that are lm_eval's own


def local_tasks(folder: Path) -> Path:
    """Three tasks and a group of two of them, as lm_eval's users write them."""
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts(5, words=31)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "text.jsonl")}},
        "validation_split": "validation",
        "doc_to_text": "",
        "doc_to_target": "text",
    }
    rolling = {"output_type": "loglikelihood_rolling"}
    rolling["metric_list"] = [{"metric": one} for one in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    generation = {"max_gen_toks": 7, "until": ["\n"]}
    writing = {"output_type": "generate_until", "doc_to_text": "{{ text[:20] }}", "generation_kwargs": generation}
    writing["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    broken = {"output_type": "loglikelihood", "metric_list": [{"metric": "perplexity", "aggregation": "nanmean"}]}
    made = {"rolling": rolling, "writing": writing | {"fewshot_split": "validation"}, "broken": broken}
    for name, config in made.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | config | {"task": f"local_{name}"}))
    lost = {
        "task": "local_lost",
        "dataset_path": "nobody/nothing",
        "test_split": "test",
        "output_type": "loglikelihood",
    }
    (folder / "lost.yaml").write_text(yaml.safe_dump(lost | {"doc_to_text": "a", "doc_to_target": "b"}))
    group = {"group": "local", "task": ["local_rolling", "local_writing"]}
    means = [{"metric": "bits_per_byte", "aggregation": "mean", "weight_by_size": True}]
    (folder / "group.yaml").write_text(yaml.safe_dump(group | {"aggregate_metric_list": means}))
    return folder


def test_rows_are_the_numbers_of_simple_evaluate_with_hflm(view, tmp_path, capfd, caplog):
    folder = local_tasks(tmp_path)
    heard = []
    found = rows_by(
        harness.run(view, ["local"], include_path=folder, limit=3, num_fewshot=0, progress=lambda *at: heard.append(at))
    )
    said = capfd.readouterr()
    assert said.out == said.err == "" and not caplog.records
    assert heard[-1] == (3, 3) and (1, 3) in heard
    golden = evaluated(hflm(view.model, view.tokenizer, 1), "local", folder, limit=3, num_fewshot=0)["results"]
    for (name, variant), row in found.items():
        assert row.value == pytest.approx(golden[name][variant.rpartition(" ")[2]], rel=1e-5)
        assert row.n == 3
        assert (row.stderr is None) is (row.metric != "exact_match")
    assert {(row.domain, row.metric, row.unit) for row in found.values()} == {
        ("local_rolling", "word_perplexity", "1"),
        ("local_rolling", "byte_perplexity", "1"),
        ("local_rolling", "bits_per_byte", "bits/byte"),
        ("local_writing", "exact_match", "1"),
        ("local", "bits_per_byte", "bits/byte"),
    }
    assert {row.split for row in found.values()} == {"validation", None}


def test_edits_examples_and_seeds_are_felt_and_nothing_is_left_behind(view, tmp_path):
    folder = local_tasks(tmp_path)
    state = random.getstate(), torch.random.get_rng_state(), logging.root.manager.disable, dict(os.environ)
    plain = harness.run(view, ["local_rolling"], include_path=folder)
    with tx.edits.remove(view, "ffn", 1):
        edited = harness.run(view, ["local_rolling"], include_path=folder)
    assert all(abs(a.value - b.value) > 1e-6 for a, b in zip(plain, edited, strict=True))
    shown = harness.run(view, ["local_writing"], include_path=folder, num_fewshot=1, limit=2)
    assert [row.variant for row in shown] == ["1-shot: exact_match,none"]
    assert random.getstate() == state[0] and torch.equal(torch.random.get_rng_state(), state[1])
    assert logging.root.manager.disable == state[2] and dict(os.environ) == state[3]


def test_sampled_text_follows_the_seed_alone(view, tmp_path, monkeypatch):
    folder = local_tasks(tmp_path)
    config = yaml.safe_load((folder / "writing.yaml").read_text())
    config["generation_kwargs"] |= {"do_sample": True, "temperature": 1.0}
    (folder / "writing.yaml").write_text(yaml.safe_dump(config))
    from transect.harness_model import HarnessModel

    kept: list[list[str]] = []
    plain = HarnessModel.generate_until
    monkeypatch.setattr(HarnessModel, "generate_until", lambda self, asked: kept.append(plain(self, asked)) or kept[-1])
    for seed in (0, 0, 1):
        harness.run(view, ["local_writing"], include_path=folder, seed=seed)
        torch.rand(3)
    assert kept[0] == kept[1] != kept[2]


def test_no_number_is_a_missing_one_with_its_reason():
    values = {"acc,none": float("nan"), "acc_stderr,none": "N/A", "f1,strict": {"a": 1}, "f1_stderr,strict": 0.5}
    results = {"results": {"one": values}, "configs": {}, "n-shot": {}, "n-samples": {"one": {"effective": 3}}}
    first, second = harness._rows(results)
    assert (first.value, first.reason, first.stderr, first.n) == (None, "lm_eval gives nan, no finite number", None, 3)
    assert (second.metric, second.value, second.stderr, second.variant) == ("f1", None, None, "f1,strict")
    assert (first.metric, first.variant) == ("accuracy", "acc,none")


def test_what_cannot_be_run(view, tmp_path):
    folder = local_tasks(tmp_path)
    for names, more, words in (
        ([], {}, "no lm_eval task is named"),
        (["local"], {"limit": 0}, "at least 1 document"),
        (["local"], {"include_path": tmp_path / "none"}, "no folder"),
    ):
        with pytest.raises(InputError, match=words):
            harness.run(view, names, **({"include_path": folder} | more))
    with pytest.raises(
        NotAtHand, match=r"lm_eval task local_lost cannot be set up: .*; have its data at hand"
    ) as error:
        harness.run(view, ["local_rolling", "local_lost"], include_path=folder)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_told_those_nearest_of_all_tasks(view, tmp_path, monkeypatch):
    import lm_eval.tasks

    made = lm_eval.tasks.TaskManager
    asked = []

    def quick(include_path: str, include_defaults: bool = True) -> object:
        asked.append(include_defaults)
        return made(include_path=include_path, include_defaults=False)  # those shipped take half a minute

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    with pytest.raises(InputError, match=r"unknown lm_eval task 'local_rollin'; nearest are local_rolling") as error:
        harness.run(view, ["local_rollin"], include_path=local_tasks(tmp_path))
    assert "\n" not in str(error.value) and asked == [False, True]
    harness.run(view, ["local"], include_path=tmp_path, limit=1)
    assert asked == [False, True, False]
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "local", "task": ["local_rolling", "arc_easy"]}))
    with pytest.raises(InputError):
        harness.run(view, ["local"], include_path=tmp_path, limit=1)
    assert asked[3:] == [False, True]


def test_the_page_runs(view, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "use_lm_eval.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict = {"view": view}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(compile(block, "docs/use_lm_eval.md", "exec"), names)
    plain, edited = (rows_by(names[one])["transect_last_word", "0-shot: perplexity,none"] for one in ("rows", "edited"))
    assert plain.value != edited.value and plain.n == 29
    values = names["results"]["results"]["transect_last_word"]
    assert values["perplexity,none"] == pytest.approx(plain.value, rel=1e-6)
