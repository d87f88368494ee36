"""Write our data sets as local tasks of lm-evaluation-harness, with the very texts that our own scoring reads."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from transect.errors import InputError
from transect.results import make_folder, write_whole
from transect.tasks import _records
from transect.tasks._items import Item, limited, option_items
from transect.tasks._sets import DataSet, data_set
from transect.tasks.base import data_label

KINDS = ("options", "minimal_pairs", "cloze")
PREFIX = "transect_"
MEAN = {"aggregation": "mean", "higher_is_better": True}


def export(
    data: str,
    folder: str | os.PathLike[str],
    *,
    folders: Sequence[str | os.PathLike[str]] = (),
    split: str = "test",
    limit: int | None = None,
    shots: int = 0,
    shot_split: str = "train",
) -> str:
    """Write a data set as a task that lm_eval runs without a network, and return the task's name.

    data: `KIND:DATA`, as `options:hellaswag`; kinds are options, minimal_pairs and cloze. The folder gets NAME.yaml and
    NAME.jsonl with context, options and right option (a set of several files: a group, and a task for each); give the
    folder to lm_eval as `--include_path`. The YAML names the records by their whole path, so write anew what is moved.
    folders: where data are looked for. limit: items, the same as in our tasks. shots: the first examples of
    `shot_split`, other than the item, stand before it, as by our order `first`. lm_eval's acc is our rule `option`,
    and `whole` for minimal pairs; acc_norm is `option per character`, where every option follows the same blank.

    Raises InputError for an unknown kind or set, records that do not fit, contexts and continuations that both differ
    between options, which lm_eval has no task for, and a folder that cannot be written to; NotAtHand for missing data.
    """
    kind, colon, named = data.partition(":")
    if not colon or kind not in KINDS:
        raise InputError(f"{data!r} is no set that lm_eval can be given; say KIND:DATA with KIND of {', '.join(KINDS)}")
    if shots < 0 or (shots and kind != "options"):
        raise InputError(f"shots is {shots}; it is 0 or more, and only sets of options take examples")
    chosen = data_set(named, kind)  # pyright: ignore[reportArgumentType]
    where = [Path(one) for one in folders]
    before = option_items(chosen, list(enumerate(chosen.records(shot_split, where)))) if shots else []
    whole = f"{PREFIX}{data_label(named)}" + (f"_{shots}shot" if shots else "")
    made = {}
    for part, records in _files(chosen, split, where):
        items = _items(chosen, limited(records, limit))
        documents = [_document(item, _shots(item, before, shots, chosen)) for item in items]
        made[f"{whole}_{part}" if part else whole] = documents
    target = Path(folder)
    make_folder(target)
    for name, documents in made.items():
        _write(target, name, documents, kind)
    names = list(made)
    if names != [whole]:
        means = [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}]
        _write_yaml(target, whole, {"group": whole, "task": names, "aggregate_metric_list": means})
    return whole


def _files(chosen: DataSet, split: str, folders: Sequence[Path]) -> Iterator[tuple[str, list[_records.Record]]]:
    """The records of each file of a set, with the file's name where there may be several."""
    if not chosen.several:
        yield "", chosen.records(split, folders)
        return
    if split not in chosen.files:
        raise InputError(f"{chosen.name} has no split {split!r}; it has {', '.join(chosen.files)}")
    patterns = chosen.files[split]
    first = _records.found(patterns, folders, chosen.name)
    for path in sorted(first.parent.iterdir()):
        if any(path.match(pattern.rsplit("/", 1)[-1]) for pattern in patterns):
            yield path.name.split(".")[0], _records.read(path)


def _items(chosen: DataSet, records: list[tuple[int, _records.Record]]) -> list[Item]:
    """The items of a set of any of the kinds; raises InputError where there are none."""
    if chosen.kind == "options":
        return option_items(chosen, records)
    items = []
    for number, record in records:
        made = chosen.read(record, number)
        if made and chosen.kind == "minimal_pairs":
            items.append(Item((("", made["good"]), ("", made["bad"])), 0, (made["good"], made["bad"])))
        elif made:
            before, blank, word = made["text"].rstrip().rpartition(" ")
            if not blank:
                raise InputError(f"record {number} of {chosen.name} is one word; a passage has one before the last")
            items.append(Item(((before, f" {word}"),), 0, (word,)))
    if not items:
        raise InputError(f"{chosen.name} has no items; give a file with some")
    return items


def _shots(item: Item, examples: Sequence[Item], count: int, chosen: DataSet) -> str:
    """What stands before an item."""
    others = [one for one in examples if one.pairs != item.pairs][:count]
    if len(others) < count:
        raise InputError(f"shots is {count}; {chosen.name} has only {len(others)} other examples")
    return "".join("".join(one.pairs[one.gold]) + chosen.shot_delimiter for one in others)


def _document(item: Item, before: str) -> dict[str, Any]:
    """An item as a record: contexts and continuations of its options, and the options without what stands before."""
    contexts = [before + context for context, _ in item.pairs]
    continuations = [continuation for _, continuation in item.pairs]
    return {"contexts": contexts, "continuations": continuations, "options": list(item.options), "gold": item.gold}


def _write(folder: Path, name: str, documents: list[dict[str, Any]], kind: str) -> None:
    """The records and the YAML of one task."""
    rows, config = _layout(name, documents, kind)
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{name}.jsonl").resolve())}},
        "test_split": "test",
        "num_fewshot": 0,  # examples, if any, stand in the contexts; lm_eval changes no 0
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    }
    write_whole(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    _write_yaml(folder, name, common | config)


def _layout(name: str, documents: list[dict[str, Any]], kind: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records as one of lm_eval's kinds of task reads them, and the settings of that kind."""
    accuracy = {"metric": "acc"} | MEAN
    if kind == "cloze":
        rows = [{"context": one["contexts"][0], "continuation": one["continuations"][0]} for one in documents]
        perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        config = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"}
        return rows, config | {"metric_list": [accuracy, perplexity]}
    config = {"output_type": "multiple_choice"}
    if all(len(set(one["contexts"])) == 1 for one in documents):
        delimiter = _delimiter(documents)
        shown = "continuations" if delimiter is None else "options"
        rows = [{"context": one["contexts"][0], "options": one[shown], "gold": one["gold"]} for one in documents]
        config |= {"doc_to_text": "context", "doc_to_choice": "options", "doc_to_target": "gold"}
        normed = {"metric": "acc_norm"} | MEAN
        return rows, config | {"target_delimiter": delimiter or "", "metric_list": [accuracy, normed]}
    if all(len(set(one["continuations"])) == 1 for one in documents):
        rows = [
            {"contexts": one["contexts"], "continuation": one["continuations"][0], "gold": one["gold"]}
            for one in documents
        ]
        config |= {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "continuation"}
        return rows, config | {"metric_list": [accuracy]}
    raise InputError(
        f"{name} has options with contexts and continuations of their own, and lm_eval knows no such task; "
        "judge it by our own task"
    )


def _delimiter(documents: Sequence[dict[str, Any]]) -> str | None:
    """What stands before every option, where it is the same for all."""
    found = {
        continuation.removesuffix(option)
        for one in documents
        for continuation, option in zip(one["continuations"], one["options"], strict=True)
    }
    return found.pop() if len(found) == 1 else None


def _write_yaml(folder: Path, name: str, config: dict[str, Any]) -> None:
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)
    write_whole(folder / f"{name}.yaml", text.encode())
