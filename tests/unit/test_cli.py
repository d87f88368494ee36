"""What the commands print."""

import json
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from families import VOCAB
from plants import view_of
from shell import command, saved_model, saved_tokens
from transect import recipes, registry, suites
from transect.catalog import KINDS, MODELS
from transect.metrics.declare import METRICS
from transect.probes.base import Probe
from transect.results import Table
from transect.tasks import _sets
from transect.view.sites import COMMON, ELEMENTS, SITES

PROBES = registry.available("transect.probes")
CHEAP = [name for name in PROBES if not registry.load("transect.probes", name, Probe).costly]
WIDTH = 80


def _tokenizer(folder: Path) -> None:
    """Letters and digits, each a token of its own."""
    symbols = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[UNK]", *symbols, *(f"##{symbol}" for symbol in symbols)]
    tokenizer = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    assert len(pieces) <= VOCAB
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    folder = saved_model(tmp_path_factory.mktemp("models") / "letters")
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tokens(tmp_path_factory.mktemp("tokens") / "tokens.npy")


def _said(*arguments: object) -> str:
    """What a command printed, all of it within the terminal."""
    done = command(*arguments)
    assert (done.code, done.err) == (0, ""), done
    assert done.out.endswith("\n")
    return done.out


def _assert_narrow(text: str) -> None:
    wide = [line for line in text.splitlines() if len(line) > WIDTH]
    assert not wide, wide


@pytest.mark.parametrize("kind", KINDS)
def test_list_has_a_line_for_every_name_at_80_columns(kind: str):
    said = _said("list", kind)
    _assert_narrow(said)
    others = {"elements": ELEMENTS, "sites": SITES, "metrics": METRICS, "models": MODELS, "recipes": recipes.names()}
    others |= {"tasks": registry.available("transect.tasks"), "suites": suites.names(), "sets": _sets.names()}
    names = ({"probes": PROBES} | others)[kind]
    first_words = [line.split()[0] for line in said.splitlines() if not line.startswith(" ")]
    assert set(names) <= set(first_words) and len(first_words) == len(set(first_words))
    assert _said("list", kind.removesuffix("s")) == said


@pytest.mark.parametrize("name", [*PROBES, "cka", "displacement", "ffn", "resid_mid", "llama"])
def test_show_has_the_whole_entry_at_80_columns(name: str):
    said = _said("show", name)
    _assert_narrow(said)
    assert said.startswith(name)
    if name in PROBES:
        assert all(label in said for label in ("\nSource: ", "\nRange and unit: ", "\nCost: ", "\nOptions\n"))


def test_show_has_every_option_with_its_default():
    said = _said("show", "nonlinearity")
    assert "\n  ridge = None\n" in said and "\n  score_fraction = 0.25\n" in said
    assert all(name in said for name in COMMON)


def test_the_bare_command_is_help():
    assert _said() == _said("--help")
    assert all(name in _said() for name in ("measure", "inspect", "list", "show", "report", "fetch"))


def test_inspect_shows_the_map_and_its_proof_at_80_columns(model: Path):
    said = _said("inspect", model)
    _assert_narrow(said)
    view = view_of("gpt2", layers=3)
    assert said.startswith("letters: GPT2LMHeadModel, 3 layers, width 40, ")
    for words in ("layers 0-2: pre_norm", "identities hold", "causal check", "final norm: ln_f; head: yes"):
        assert words in said, said
    for site in view.maps[0].taps:
        assert f" {site} " in said
    assert f"{sum(p.numel() for p in view.model.parameters()):,} parameters" in said


def test_measure_prints_a_table_for_each_probe(model: Path, tokens: Path, tmp_path: Path):
    said = _said("measure", model, "--tokens", tokens, "--seq-len", 23, "--output", tmp_path / "run")
    for words in ("61 documents", "jump: how far", "nonlinearity: held-out", "similarity: directions", "rows and run"):
        assert words in said, said
    grids = [line for line in said.splitlines() if "rows and run record" not in line]
    _assert_narrow("\n".join(grids[2:]))
    table = Table.read(tmp_path / "run")
    value = table.where(metric="displacement", layer=1, variant="pre_norm/all").rows[0].value
    assert f"{value:.4g}" in said
    assert {row.probe for row in table} == set(CHEAP) and {"ablation", "commutativity"} <= set(PROBES) - set(CHEAP)
    assert {row.model for row in table} == {"letters"}


SMALL = ["--set", "ablation.sample=99", "--set", "commutativity.sample=99", "--set", "routing.removal_sample=99"]


def test_all_probes_are_measured_when_asked_for(tokens: Path, tmp_path: Path):
    sparse = saved_model(tmp_path / "sparse", "mixtral")
    arguments = ["--tokens", tokens, "--seq-len", 23, "--dtype", "float64", "--probe"]
    said = _said("measure", sparse, *arguments, "all", *SMALL, "--output", tmp_path / "run")
    assert all(f"\n{name}: " in said for name in PROBES), said
    assert {row.probe for row in Table.read(tmp_path / "run")} == set(PROBES)
    dense = saved_model(tmp_path / "dense")
    said = _said("measure", dense, *arguments, "all", *SMALL, "--output", tmp_path / "other")
    assert "note    routing is left out: no layer of dense has a sparse FFN" in said
    assert {row.probe for row in Table.read(tmp_path / "other")} == set(PROBES) - {"routing"}
    asked = command("measure", dense, *arguments, "routing")
    assert (
        asked.code == 2 and asked.err.startswith("transect: routing: no layer of dense") and asked.err.count("\n") == 1
    )


def test_a_cheap_probe_that_does_not_suit_the_model_is_left_out_with_a_word(tokens: Path, tmp_path: Path):
    masked = saved_model(tmp_path / "masked", "bert")
    arguments = ["measure", masked, "--tokens", tokens, "--seq-len", 23]
    said = _said(*arguments, "--output", tmp_path / "run")
    assert "note    contribution is left out: masked is asked for masked tokens" in said
    assert {row.probe for row in Table.read(tmp_path / "run")} == set(CHEAP) - {"contribution"}
    asked = command(*arguments, "--probe", "contribution")
    assert asked.code == 2 and "--set contribution.mask_id=ID" in asked.err and asked.err.count("\n") == 1
    with_id = _said(*arguments, "--set", "contribution.mask_id=3")
    assert "left out" not in with_id and "\ncontribution: " in with_id


def test_options_reach_the_probe(model: Path, tokens: Path, tmp_path: Path):
    settings = ["--set", "nonlinearity.elements=[ffn, attn]", "--set", "nonlinearity.ridge=0.5"]
    arguments = ["--tokens", tokens, "--seq-len", 23, "--probe", "nonlinearity", "--output", tmp_path / "run"]
    _said("measure", model, *arguments, *settings, "--seed", 3)
    table = Table.read(tmp_path / "run")
    assert {row.element for row in table} == {"ffn", "attn"}
    assert {row.value for row in table.where(metric="ridge")} == {0.5}
    assert {row.seed for row in table} == {3}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (options,) = config["probes"]
    assert options["probe"] == "nonlinearity" and options["elements"] == ["ffn", "attn"]


def test_without_a_text_the_built_in_one_is_measured_and_named(model: Path, tmp_path: Path):
    arguments = ["--limit-tokens", 2999, "--seq-len", 29, "--probe", "jump", "--output", tmp_path / "run"]
    said = _said("measure", model, *arguments)
    assert "small built-in text" in said and "--text" in said and "State of the Union" in said
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert any("built-in text" in note for note in environment["notes"])
    assert all("built in" in row.data for row in Table.read(tmp_path / "run"))


def test_a_text_of_ones_own_is_measured_without_that_note(model: Path, tmp_path: Path):
    records = ({"text": f"{number} of the letters and {number * 7919} of the digits"} for number in range(40))
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    said = _said("measure", model, "--text", tmp_path / "own.jsonl", "--seq-len", 29, "--probe", "jump")
    assert "own.jsonl" in said and "40 documents" in said and "built-in" not in said


def test_a_text_that_is_missing_empty_or_short_is_refused(model: Path, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    for name, words in (("absent.txt", "no file"), ("empty.txt", "is empty"), ("short.txt", "less than one sequence")):
        output = tmp_path / "run"
        refused = command("measure", model, "--text", tmp_path / name, "--seq-len", 29, "--output", output)
        assert refused.code == 2 and refused.err.count("\n") == 1 and refused.err.startswith("transect: ")
        assert words in refused.err and not output.exists(), refused.err


def test_several_revisions_come_in_one_table(tokens: Path, tmp_path: Path):
    for step in (1, 2):
        saved_model(tmp_path / "trained" / "checkpoints" / f"step-{step}", seed=step)
    revisions = ["--revision", "step-1", "--revision", "step-2"]
    arguments = [tmp_path / "trained", "--tokens", tokens, "--seq-len", 23, "--probe", "jump"]
    _said("measure", *arguments, *revisions, "--output", tmp_path / "run")
    table = Table.read(tmp_path / "run")
    one, two = (table.where(revision=f"step-{step}") for step in (1, 2))
    assert len(one) == len(two) == len(table) / 2 > 0
    assert one.rows != two.rows and {row.model for row in table} == {"trained"}
    assert Table.read(tmp_path / "run" / "step-1").rows == one.rows
    _said("measure", *arguments, *revisions, "--output", tmp_path / "run", "--resume")
    assert Table.read(tmp_path / "run").rows == table.rows
    last = _said("measure", *arguments, "--output", tmp_path / "last")
    assert "trained" in last and {row.revision for row in Table.read(tmp_path / "last")} == {"step-2"}
    wrong = command("measure", *arguments, "--revision", "step-3")
    assert wrong.code == 2 and "'step-3'; it has step-1, step-2" in wrong.err


def test_report_says_what_it_wrote(model: Path, tokens: Path, tmp_path: Path):
    arguments = ["--tokens", tokens, "--seq-len", 23, "--probe", "similarity", "--output", tmp_path / "run"]
    _said("measure", model, *arguments)
    said = _said("report", tmp_path / "run", "-o", tmp_path / "report.html")
    assert f"wrote {tmp_path / 'report.html'} and " in said
    assert "probes.1.sample" in (tmp_path / "report.html").read_text()
