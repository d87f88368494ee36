"""What README and docs show runs and is there."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import corpora
import judged
import transect as tx
from families import tiny_model
from transect import registry, suites
from transect.models import ModelConfig, TransectForCausalLM
from transect.probes.base import Probe

ROOT = Path(__file__).parents[2]


def fences(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


@pytest.mark.real
@pytest.mark.parametrize("material", ["minilm"], indirect=True)
def test_readme_python_runs(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "material").symlink_to(ROOT / "material")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in fences("README.md", "python"):
        exec(compile(block, "README.md", "exec"), names)
    assert {row.metric for row in names["table"]} >= {"displacement", "r2_heldout", "cosine_closed_form"}
    assert tx.Table.read(tmp_path / "out/readme").rows == names["table"].rows
    assert names["seen"]["ffn_out", 3].shape[-1] == 384
    assert AutoModelForCausalLM.from_pretrained("out/tiny").settings == names["recipe"].model
    ids = torch.tensor([[101, 2023, 2003, 102]])
    outputs = [names[name].eval()(input_ids=ids).last_hidden_state for name in ("ours", "native")]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_model_of_the_docs_is_built_and_measured() -> None:
    names: dict = {}
    exec(compile(fences("docs/build_a_model.md", "python")[0], "docs/build_a_model.md", "exec"), names)
    out = names["out"]
    assert set(out.losses) == {"main", "jump"}
    torch.testing.assert_close(out.loss, out.losses["main"] + out.losses["jump"])
    assert float(out.stats["layers.1.load"].sum()) == pytest.approx(1)
    assert {row.metric for row in names["table"]} >= {"displacement", "cka"}


def test_selector_and_block_of_the_docs_train_and_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, page in (("avg_v", "docs/add_a_selector.md"), ("gained", "docs/add_a_block.md")):
        (tmp_path / f"{name}.py").write_text(fences(page, "python")[0])
        monkeypatch.delitem(sys.modules, name, raising=False)
    settings = ModelConfig.parse(
        {
            "vocab_size": 97,
            "width": 32,
            "layers": 3,
            "block": {"kind": "gained:Gained"},
            "ffn": {"kind": "sparse", "expansion": 4, "selector": {"kind": "avg_v:AvgV", "gate": "softmax_all"}},
        }
    )
    model = TransectForCausalLM.make(settings)
    ids = torch.randint(5, 90, (23, 13), generator=torch.Generator().manual_seed(3))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    memory, selector = model.model.layers[0].ffn.memory, model.model.layers[0].ffn.selector
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(4))
    best = (x @ memory.values.mean(1).T).topk(selector.shape.active).indices
    assert torch.equal(selector(x, memory).blocks.sort().values, best.sort().values)
    table = tx.measure(tx.View(model.eval(), name="mine"), ["jump"], tx.data.from_tokens(ids))
    assert len(table.where(metric="displacement")) > 0


def test_readme_names_folders_that_exist() -> None:
    tree = fences("README.md", "")[-1]
    for name in re.findall(r"(\w+/|\w+\.py)", tree):
        assert (ROOT / name).exists() or (ROOT / "src/transect" / name).exists(), name
    commands = " ".join(fences("README.md", "sh"))
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"make (\w+)", commands))


def test_probe_of_the_docs_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = fences("docs/add_a_probe.md", "python")[0]
    (tmp_path / "update_share.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "update_share", raising=False)
    kind = registry.load("transect.probes", "update_share:UpdateShare", Probe)
    view = tx.View(tiny_model("gpt2", torch.float64), name="gpt2")
    ids = torch.randint(5, 90, (23, 13), generator=torch.Generator().manual_seed(3))
    table = tx.measure(view, [kind()], tx.data.from_tokens(ids))
    with view.capture(["attn_out", "ffn_out"]) as seen, torch.no_grad():
        view.run(ids)
    for row in table:
        attn, ffn = (seen[site, row.layer].square().sum() for site in ("attn_out", "ffn_out"))
        assert row.value == pytest.approx(float(attn / (attn + ffn)), rel=1e-12)
        assert row.low < row.value < row.high
    assert len(table) == 3


def test_probe_with_edits_of_the_docs_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends.py").write_text(fences("docs/add_a_probe.md", "python")[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ends", raising=False)
    kind = registry.load("transect.probes", "ends:Ends", Probe)
    view = tx.View(tiny_model("gpt2", torch.float64, 0, 3), name="gpt2")
    ids = torch.randint(5, 90, (23, 13), generator=torch.Generator().manual_seed(3))
    table = tx.measure(view, [kind()], tx.data.from_tokens(ids))
    for layer in (0, 2):
        (row,) = table.where(metric="loss", layer=layer).rows
        with tx.edits.remove(view, "layer", layer):
            logits = view.logits(ids)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert row.value == pytest.approx(float(loss), rel=1e-12)
        assert row.edit == f"without layer {layer}" and row.stderr > 0


def test_task_of_the_docs_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first_word.py").write_text(fences("docs/add_a_task.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "first_word", raising=False)
    one = judged.view()
    corpora.write_texts(tmp_path / "texts.jsonl", texts := corpora.documents(7, 3, length=5))
    task = suites.make("first_word:FirstWord", {"data": "texts.jsonl"})
    (row,) = tx.evaluate(one, [task], folders=[tmp_path])
    start, ids = one.tokenizer.bos_token_id, [one.tokenizer(text)["input_ids"][0] for text in texts]
    nats = [judged.causal_nats(one.model, [start], [first])[0] for first in ids]
    assert row.value == pytest.approx(-sum(nats) / 7, abs=1e-9) and row.n == 7 and row.task == "first_word"


def test_data_set_of_the_docs_is_read(tmp_path: Path) -> None:
    text = fences("docs/judge.md", "yaml")[0]
    (tmp_path / "capitals.yaml").write_text(text)
    record = {"country": "France", "capital": "Paris", "others": ["Lyon", "Nice"]}
    (tmp_path / "capitals.jsonl").write_text(json.dumps(record) + "\n")
    task = suites.make("options", {"data": str(tmp_path / "capitals.yaml")})
    table = tx.evaluate(judged.view("llama", positions=512), [task], folders=[tmp_path])
    assert table.where(variant="chance").rows[0].value == pytest.approx(1 / 3)


@pytest.mark.real
@pytest.mark.parametrize("material", ["minilm"], indirect=True)
def test_python_of_the_judging_page_runs(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(compile(fences("docs/judge.md", "python")[0], "docs/judge.md", "exec"), names)
    assert len(names["table"].where(metric="accuracy", site="resid")) == 7
