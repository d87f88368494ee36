"""Training after an edit as a user has it: a run that was broken off goes on, and bad input is one line."""

from collections import Counter
from pathlib import Path

import pytest

import transect as tx
from labelled_texts import marked, view, written
from plants import only, text, value
from shell import command, saved_tokens
from transect.after_edit import Transfer
from transect.probes.ablation import Ablation
from transect.probes.base import Probe
from transect.probes.commutativity import Commutativity

STAGES = ("", "/continued")
QUICK = {"epochs": 1, "lr": 3e-3, "batch_size": 16, "length": 31}


class Broken(Exception):
    """What stops a run as hard as a kill does: nothing is saved on the way out."""


class Ticks:
    """Counts what is heard of each phase, and ends the run at one of the trainings' ticks."""

    def __init__(self, after: int = -1, error: type[BaseException] = Broken) -> None:
        self.after, self.error = after, error
        self.heard: Counter[str] = Counter()
        self.tokens = 0

    def __call__(self, tokens: int, phase: str) -> None:
        self.heard[phase] += 1
        self.tokens += tokens
        if phase == "train" and self.heard[phase] == self.after:
            raise self.error


def probes(kind: str, folder: Path) -> list[Probe]:
    if kind == "text":
        transfer = Transfer(steps=3, lr=1e-3, batch_size=8)
        return [Ablation(parts=("ffn",), methods=("linear", "freeze"), schedules=("single",), transfer=transfer)]
    transfer = Transfer(data=written(folder, marked(61, 1), marked(31, 2)), **QUICK)
    return [Commutativity(kinds=("pairs", "repeat"), transfer=transfer)]


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["text", "labels"])
def test_a_run_that_was_broken_off_goes_on_to_the_same_rows(kind: str, error: type[BaseException], tmp_path: Path):
    v, data, chosen = view("gpt2"), text(61), probes(kind, tmp_path)
    counted, output = Ticks(), str(tmp_path / "run")
    whole = tx.measure(v, chosen, data, progress=counted)
    plan = tx.plan(v, chosen, data)
    trainings = len(plan.passes[0].trainings)
    assert trainings == {"text": 1 + 2 + 2, "labels": 2 + 1 + 2}[kind]
    assert 0.8 < counted.tokens / plan.tokens < 1.25
    per_training = counted.heard["train"] / trainings
    with pytest.raises(error):
        tx.measure(v, chosen, data, output=output, progress=Ticks(round(3.5 * per_training), error))
    again = Ticks()
    resumed = tx.measure(v, chosen, data, output=output, resume=True, progress=again)
    assert resumed.rows == whole.rows
    assert tx.Table.read(output).rows == whole.rows
    assert again.heard["train"] < 2.2 * per_training and not again.heard["edit"]  # three were done and stay done


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a measurement of a tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    made = view("gpt2")
    made.model.save_pretrained(folder / "model")
    made.tokenizer.save_pretrained(folder / "model")
    tokens = saved_tokens(folder / "tokens.npy", documents=61)
    return [str(folder / "model"), "--tokens", str(tokens), "--seq-len", "23", "--probe", "commutativity"]


def test_the_plan_counts_trainings(inputs: list[str], tmp_path: Path):
    data = written(tmp_path, marked(61, 1), marked(31, 2))
    option = f"commutativity.transfer={{data: {data}, after_edit: continued, length: 31, epochs: 2}}"
    found = command("measure", *inputs, "--set", "commutativity.kinds=[adjacent]", "--set", option, "--dry-run")
    assert found.code == 0, found.err
    said = found.out + found.err
    assert "3 trainings of edited models, as long as" in said and "time    about" in said


@pytest.mark.parametrize(
    ("transfer", "why"),
    [
        ("{data: eras, length: 31}", "unknown data set 'eras'; did you mean 'era'?"),
        ("{data: era, after_edit: later, length: 31}", "after_edit is 'later'; allowed are direct, continued"),
        ("{data: era, lenght: 31}", "transfer has no option 'lenght'"),
        ("{data: era, length: 300}", "takes up to 64 tokens"),
        ("{data: one_class, length: 31}", "one class alone"),
        ("{data: unlabelled, length: 31}", "has no label"),
        ("{data: mnli, length: 31}", "mnli"),
        ("{freeze: ['ffn:7']}", "ffn:7 cannot be frozen"),
    ],
)
def test_bad_input_is_one_line(inputs: list[str], tmp_path: Path, transfer: str, why: str):
    one = [record | {"label": "same"} for record in marked(31, 1)]
    for name, records in (("one_class", one), ("unlabelled", [{"text": r["text"], "label": None} for r in one])):
        (tmp_path / name).mkdir()
        transfer = transfer.replace(name, written(tmp_path / name, records, one[:5]))
    found = command("measure", *inputs, "--set", f"commutativity.transfer={transfer}")
    assert found.code == 2
    lines = " ".join(found.err.split())
    assert why in lines and "Traceback" not in found.err, found.err
    assert len([line for line in found.err.splitlines() if line.startswith("error")]) <= 1


@pytest.mark.real
@pytest.mark.parametrize("material", ["minilm"], indirect=True)
def test_training_helps_a_real_encoder(material: Path):
    """Few texts, one epoch, the first layers in the place of the last."""
    v = tx.View.load(material / "minilm")
    transfer = Transfer(data="era", epochs=1, lr=2e-4, batch_size=8, train_items=96, test_items=64, length=32)
    probe = Commutativity(kinds=("pattern",), pattern_widths=(4,), sample=128, transfer=transfer)
    table = tx.measure(v, [probe], tx.data.builtin_text(v.tokenizer, seq_len=32, limit_tokens=300))
    direct, continued = (
        value(table, metric="accuracy", edit="pattern 0,1,2,3", variant=f"pattern{stage}") for stage in STAGES
    )
    assert continued >= direct
    assert only(table, metric="accuracy", variant="intact").n == 64
