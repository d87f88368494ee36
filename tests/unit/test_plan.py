"""A plan says what will be done: passes, layers, tokens, memory."""

import numpy as np
import pytest
import torch

from families import FAMILIES
from plants import built, text, view_of
from shell import command, contents, saved_model, saved_tokens
from stops import packed_bytes
from transect import memory
from transect.data.objective import Objective
from transect.errors import InputError
from transect.measure import run
from transect.plan import SHARE, Plan, make
from transect.probes.ablation import Ablation
from transect.probes.base import Probe, Reading
from transect.probes.commutativity import Commutativity
from transect.probes.jump import Jump
from transect.probes.nonlinearity import Nonlinearity
from transect.probes.similarity import Similarity

LAYERS = 5
PROBES = (Similarity(sample=53), Nonlinearity(), Jump(windows=False))


def _plan(free: float | None = None, probes: tuple = PROBES, **options: object) -> Plan:
    return make(view_of("gpt2", layers=LAYERS), probes, text(), 7, free=None if free is None else int(free), **options)


def _layers(plan: Plan, probe: str) -> list[tuple[int, ...]]:
    """The layers a probe sees in each pass it takes part in."""
    return [
        setting.layers
        for item in plan.passes
        for member, setting in zip(item.probes, item.settings, strict=True)
        if member.name == probe
    ]


def test_enough_memory_is_one_pass_over_all_layers():
    plan = _plan()
    assert len(plan.passes) == 1
    for probe in ("jump", "nonlinearity", "similarity"):
        assert _layers(plan, probe) == [tuple(range(LAYERS))]
    assert plan.tokens == plan.data.num_tokens


def test_every_sequence_is_in_one_stage_of_a_pass():
    (item,) = _plan().passes
    assert [stage.phase for stage in item.stages] == ["fit", "tune", "score"]
    together = np.concatenate([stage.sequences for stage in item.stages])
    assert sorted(together.tolist()) == list(range(text().num_sequences))
    for stage in item.stages:
        assert (np.diff(text().lengths[stage.sequences]) <= 0).all()


@pytest.mark.parametrize(("share", "passes"), [(0.9, 2), (0.6, 3), (0.45, 5)])
def test_little_memory_is_several_passes_with_the_same_rows(share: float, passes: int):
    whole = _plan()
    plan = _plan(whole.bytes * share / SHARE)
    assert len(plan.passes) == passes
    assert [layer for group in _layers(plan, "nonlinearity") for layer in group] == list(range(LAYERS))
    assert _layers(plan, "jump") == _layers(plan, "similarity") == [tuple(range(LAYERS))]
    assert plan.bytes <= whole.bytes * share + 1
    assert plan.tokens == passes * plan.data.num_tokens
    expected = {_place(row): row for row in run(whole)}
    found = {_place(row): row for row in run(plan)}
    assert found == expected  # bit for bit


def _place(row: object) -> tuple:
    return tuple(getattr(row, name) for name in ("probe", "metric", "layer", "layer_to", "element", "variant", "split"))


def test_too_little_memory_for_a_layer_is_refused():
    needed = _plan().bytes
    with pytest.raises(InputError, match="not enough memory: one layer of"):
        _plan(0.3 * needed / SHARE)
    with pytest.raises(InputError, match="not enough memory: similarity, jump"):
        _plan(1000)
    with pytest.raises(InputError, match="not enough memory: jump"):
        _plan(1000, (Jump(),))


class _Kept(Nonlinearity):
    """Keeps the largest state that it had at the end of a phase."""

    largest = 0

    def turn(self, state, setting, phase):
        _Kept.largest = max(_Kept.largest, packed_bytes(state.pack()))
        super().turn(state, setting, phase)


@pytest.mark.parametrize("options", [{}, {"elements": ("ffn", "layer"), "cosine": ("ffn",)}, {"project": 17}])
def test_the_estimate_of_nonlinearity_is_within_a_factor_of_two(options: dict):
    wide = built(FAMILIES["gpt2"].but(n_embd=116, n_inner=431), 4, torch.float32)
    probe = _Kept(**options)
    plan = make(wide, [probe], text(), 16)
    _Kept.largest = 0
    run(plan)
    assert _Kept.largest > 100_000
    assert 0.5 <= plan.bytes / _Kept.largest <= 2


@pytest.mark.parametrize("probe", [Jump(), Similarity(sample=499)])
def test_the_estimate_of_the_others_is_enough_and_not_wasteful(probe: Jump | Similarity):
    plan = make(view_of("gpt2", layers=LAYERS), [probe], text(), 16)
    (item,) = plan.passes
    size = packed_bytes(probe.start(item.settings[0], None).pack())
    assert size <= plan.bytes <= 20 * size


def test_probes_with_other_splits_take_passes_of_their_own():
    plan = _plan(None, (Jump(), Nonlinearity(score_fraction=0.3), Nonlinearity()))
    assert [[probe.name for probe in item.probes] for item in plan.passes] == [
        ["nonlinearity", "jump"],
        ["nonlinearity"],
    ]


def _companies(*probes: Probe, name: str = "gpt2") -> list[list[str]]:
    return [[type(p).__name__ for p in item.probes] for item in make(view_of(name), probes, text(), 7).passes]


class _Twice(Jump):
    """Goes through the text in two rounds."""

    def reading(self, view):
        return Reading(rounds=2, targets=Objective(kind="causal"))


class _Masked(Jump):
    """Looks into the model while it reads masked text."""

    def reading(self, view):
        return Reading(targets=Objective(kind="masked", mask_id=3))


def test_probes_with_edits_go_alone():
    orders, parts = Commutativity(), Ablation(methods=("mean",))
    assert _companies(orders, Jump(), parts, Similarity(), Nonlinearity(), Commutativity()) == [
        ["Commutativity"],
        ["Ablation"],
        ["Nonlinearity", "Jump", "Similarity"],
        ["Commutativity"],
    ]
    assert _companies(orders, Jump(), Similarity()) == [["Jump", "Similarity"], ["Commutativity"]]
    assert _companies(_Twice(), Jump(), _Twice()) == [["_Twice", "_Twice", "Jump"]]


def test_plain_text_is_not_measured_on_masked_text():
    assert _companies(_Masked(), Jump()) == [["Jump"], ["_Masked"]]
    (plain, masked) = make(view_of("gpt2"), (_Masked(), Jump()), text(), 7).passes
    assert np.array_equal(plain.data.ids, text().ids) and not np.array_equal(masked.data.ids, text().ids)
    assert plain.data.target is None and masked.data.target is not None


def test_a_guest_of_two_rounds_sees_every_token_once():
    twice, guest = (run(make(view_of("gpt2"), probes, text(), 7)) for probes in ((_Twice(),), (_Twice(), Jump())))
    alone = run(make(view_of("gpt2"), (Jump(),), text(), 7))
    rows = guest.rows[len(twice) :]
    assert len(rows) == len(alone)
    for row, other, host in zip(rows, alone, twice, strict=True):
        assert (row.metric, row.n) == (other.metric, other.n) and 2 * row.n == host.n
        assert row.value == pytest.approx(other.value, rel=1e-12, abs=1e-12)
    stages = make(view_of("gpt2"), (_Twice(), Jump()), text(), 7).passes[0].stages
    assert [(stage.phase, stage.again) for stage in stages] == [("fit", False), ("score", True)]
    assert list(stages[0].sequences) == list(stages[1].sequences)


def test_edits_are_made_on_a_sample_of_what_is_scored():
    def phases(probe: Probe) -> dict[str, list[int]]:
        (item,) = make(view_of("gpt2"), (probe,), text(), 7).passes
        for setting in item.settings:
            assert list(setting.edit_sequences) == list(item.stages[-1].sequences)
        return {stage.phase: stage.sequences.tolist() for stage in item.stages}

    everything = set(range(text().num_sequences))
    whole = phases(Commutativity(sample=10**6))
    assert list(whole) == ["edit"] and set(whole["edit"]) == everything
    fitted = phases(Ablation(methods=("zero", "linear"), sample=10**6))
    assert list(fitted) == ["fit", "tune", "edit"]
    assert set(fitted["edit"]) == everything - set(fitted["fit"]) - set(fitted["tune"])
    trained = Ablation(methods=("mse_adam",), train_epochs=2)
    assert [s.phase for s in make(view_of("gpt2"), (trained,), text(), 7).passes[0].stages] == [
        "fit", "tune", "train", "train", "train", "edit",
    ]  # fmt: skip
    few = phases(Ablation(methods=("zero", "linear"), sample=53))["edit"]
    assert set(few) < set(fitted["edit"]) and 53 - 13 < text().lengths[few].sum() <= 53
    assert len(phases(Commutativity(sample=1))["edit"]) == 1


def test_training_adds_its_epochs():
    plan = _plan(None, (Nonlinearity(trained="mse_adam", train_epochs=2),))
    phases = [stage.phase for stage in plan.passes[0].stages]
    assert phases == ["fit", "tune", "train", "train", "score"]
    first, second = (stage.sequences for stage in plan.passes[0].stages if stage.phase == "train")
    assert sorted(first) == sorted(second) and list(first) != list(second)


def test_the_plan_in_words():
    lines = "\n".join(_plan().lines())
    for words in (
        "5 layers, width 40",
        "61 documents",
        "pass 1  nonlinearity, similarity, jump: layers 0-4",
        "tune",
        "free",
    ):
        assert words in lines, lines


def test_nothing_to_do_is_refused():
    with pytest.raises(InputError, match="no probe given; known are ablation"):
        _plan(None, ())
    with pytest.raises(InputError, match="unknown probe 'jmp'"):
        _plan(None, ("jmp",))


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transect.commands.run", lambda *_: pytest.fail("a dry run must not run"))
    model, tokens = saved_model(tmp_path / "model"), saved_tokens(tmp_path / "tokens.npy")
    before = contents(tmp_path)
    dry = command("measure", model, "--tokens", tokens, "--seq-len", 23, "--output", tmp_path / "run", "--dry-run")
    assert (dry.code, dry.err) == (0, "")
    for words in ("pass 1  ", "jump, similarity: layers 0-2", "nonlinearity: layers 0-2", "1,403 tokens", "memory"):
        assert words in dry.out, dry.out
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


def test_sizes_are_readable():
    assert [memory.readable(size) for size in (0, 999, 1000, 1.5e6, 2e9, 3e12)] == [
        "0 B", "999 B", "1.0 kB", "1.5 MB", "2.0 GB", "3000.0 GB",
    ]  # fmt: skip
    assert memory.available(torch.device("cpu")) > 1_000_000
