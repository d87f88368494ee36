"""A real model on standard sets in lm-evaluation-harness: our object and its own `HFLM` agree document by document."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness_setup import hflm, without_network
from transect import harness
from transect.tasks.base import Subject
from transect.tasks.options import Options
from transect.view.view import View

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
DOCUMENTS = 23


@pytest.mark.real
@pytest.mark.parametrize("material", ["smollm2"], indirect=True)
@pytest.mark.parametrize("data", ["options:arc_easy", "options:winogrande", "cloze:lambada"])
def test_smollm2_is_judged_as_by_hflm(material: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not (DATA / "tasks").is_dir():
        pytest.skip("the standard sets are not at hand")
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    without_network(tmp_path, monkeypatch)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    name = harness.export(data, tmp_path / "out", folders=[DATA], limit=DOCUMENTS)
    manager = TaskManager(include_path=str(tmp_path / "out"), include_defaults=False)
    model = AutoModelForCausalLM.from_pretrained(material / "smollm2", dtype="float32")
    view = View(model, AutoTokenizer.from_pretrained(material / "smollm2"))
    found = [
        lm_eval.evaluator.simple_evaluate(model=one, tasks=[name], task_manager=manager, bootstrap_iters=0)
        for one in (harness.model(view, batch_size=5), hflm(model, view.tokenizer, 4))
    ]
    ours, golden = ([value for sample in one["samples"][name] for value in sample["resps"]] for one in found)
    assert len(ours) == len(golden) >= DOCUMENTS
    for ((mine, flag),), ((known, wanted),) in zip(ours, golden, strict=True):
        assert mine == pytest.approx(known, abs=1e-4, rel=1e-5)
        assert flag is wanted
    numbers = [{k: v for k, v in one["results"][name].items() if isinstance(v, float)} for one in found]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    assert numbers[0]["acc,none"] == numbers[1]["acc,none"] > 0
    if data == "options:arc_easy":
        task = Options(data="arc_easy", limit=DOCUMENTS, unconditional=False)
        rows = {row.variant: row.value for row in task.rows(Subject(view=view, folders=(DATA,)))}
        assert rows["0-shot: option"] == numbers[0]["acc,none"]


LAZY = """
import sys
import transect.harness, transect.cli
assert "lm_eval" not in sys.modules and "datasets" not in sys.modules
"""


def test_lm_eval_is_not_imported_before_it_is_asked_for():
    subprocess.run([sys.executable, "-c", LAZY], check=True, cwd=ROOT, env=os.environ)
