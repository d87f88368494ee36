"""Dense and sparse FFNs: settings, parts, losses, FLOPs; how a back end is chosen and measured."""

import json
import os
import re

import pytest
import torch
from torch.nn import functional

from transect.errors import InputError
from transect.models.config import ModelConfig
from transect.models.ffn.base import build
from transect.models.ffn.sparse import Sparse
from transect.models.memory import choice, tune
from transect.models.memory.choice import Case, Measured, Picker, choose, find_table, lines, read_table
from transect.models.memory.memory import Memory

MEMORY = {"kind": "sparse", "expansion": 4, "block_size": 8, "active_blocks": 5}


LOOKING_AHEAD = """
from transect.models.selectors.avg_k import AvgK
from transect.models.selectors.base import Selector, SelectorConfig

class Silent(Selector):
    class Config(SelectorConfig):
        kind: str
    causal_safe = False
    def forward(self, x, memory, token_ids=None, real=None): ...
    def flops(self): return 0.0

class Scored(AvgK):
    class Config(AvgK.Config):
        kind: str
    causal_safe = False
"""


def model(ffn, width: int = 12, **settings) -> ModelConfig:
    given = {"vocab_size": 53, "width": width, "layers": 1, "attention": {"heads": 1, "head_width": 2}, "ffn": ffn}
    return ModelConfig.parse(given | settings)


def made(ffn, width: int = 12, index: int = 0, **settings):
    config = model(ffn, width, **settings)
    return build(config.layer_configs[0].ffn, config, index)


def sparse(**settings) -> Sparse:
    found = made(MEMORY | settings)
    assert isinstance(found, Sparse)
    return found


def refusal(ffn, width: int = 12, **settings) -> str:
    with pytest.raises(InputError) as caught:
        model(ffn, width, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestDense:
    def test_is_its_formula(self, generator):
        ffn = made({"kind": "dense", "width": 31, "activation": "silu"})
        x = torch.randn(2, 5, 12, generator=generator)
        cells = functional.silu(functional.linear(x, ffn.up.weight, ffn.up.bias))
        found = ffn(x, None, None)
        assert torch.allclose(found.hidden, functional.linear(cells, ffn.down.weight, ffn.down.bias))
        assert (found.losses, found.stats) == ({}, {})

    def test_gated_is_its_formula(self, generator):
        ffn = made({"kind": "dense", "multiple": 2.5, "activation": "silu", "gated": True, "bias": False})
        x = torch.randn(7, 12, generator=generator)
        expected = (functional.silu(x @ ffn.gate.weight.T) * (x @ ffn.up.weight.T)) @ ffn.down.weight.T
        assert torch.allclose(ffn(x, None, None).hidden, expected, atol=1e-6)
        assert {name for name, _ in ffn.named_parameters()} == {"gate.weight", "up.weight", "down.weight"}
        assert ffn.flops() == 2 * 3 * 12 * 30

    def test_default_is_four_times_the_width(self):
        ffn = made("dense")
        assert ffn.up.weight.shape == (48, 12)
        assert [name for name, _ in ffn.named_children()] == ["up", "act", "down"]
        assert ffn.flops() == 4 * 12 * 48

    def test_units_must_be_whole(self):
        assert refusal({"kind": "dense", "multiple": 1.3}).startswith("ffn.multiple is 1.3: times width 12")

    def test_split_by_units(self):
        config = model({"kind": "dense", "width": 30})
        inner, outer = config.ffn.split(0.3, config)
        assert (inner.width, outer.width) == (9, 21)
        assert config.ffn.split(0, config) == (None, config.ffn)
        assert config.ffn.split(1, config)[1] is None
        with pytest.raises(ValueError, match=r"30 units cannot be split at 0\.25"):
            config.ffn.split(0.25, config)
        with pytest.raises(ValueError, match=r"at 1\.5"):
            config.ffn.split(1.5, config)


class TestSizes:
    def test_defaults(self):
        config = model("sparse", width=32)
        assert (config.ffn.cells_per_block(config), config.ffn.count(config), config.ffn.active(config)) == (8, 256, 16)
        assert config.ffn.selector.kind == "avg_k"
        assert not config.ffn.bias

    @pytest.mark.parametrize("size", [{"expansion": 2}, {"width": 96}, {"blocks": 12}], ids=str)
    def test_three_ways_to_say_it(self, size):
        assert made({"kind": "sparse", "block_size": 8, "active_blocks": 5} | size).memory.values.shape == (12, 8, 12)

    @pytest.mark.parametrize(
        ("changes", "start"),
        [
            ({"width": 96}, "ffn.width is 96: expansion is given too"),
            ({"expansion": 1.1}, "ffn.expansion is 1.1: must give a whole number of blocks of 8 cells"),
            ({"expansion": None, "width": 97}, "ffn.width is 97: must give"),
            ({"active_blocks": 25}, "ffn.active_blocks is 25: more than there are; a memory of 24"),
            ({"block_size": 7, "active_blocks": None}, "ffn.block_size is 7: does not divide"),
            ({"selector": "vanilla_m"}, "ffn.block_size is 8: selector vanilla_m picks single cells"),
            (
                {"selector": "pkm", "block_size": 1, "gated": True},
                "ffn.gated is True: selector pkm has keys of its own",
            ),
            ({"selector": "nope"}, "ffn.selector is 'nope': unknown selector"),
            ({"selector": {"kind": "avg_k", "gat": 1}}, "ffn.selector.gat is not a setting; did you mean 'gate'"),
            ({"selector": "expert_choice"}, "ffn.selector"),
            ({"backend": "fast"}, "ffn.backend"),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, changes, start):
        assert refusal(MEMORY | changes).startswith(start)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("Silent", r"ffn\.selector\.kind is '[^']*:Silent': looks at later tokens and has no option accept_leak"),
            ("Scored", r"ffn\.selector\.accept_leak is False: selector [^ ]*:Scored looks at later tokens"),
        ],
    )
    def test_a_selector_from_outside_that_looks_ahead_needs_consent(self, name, said, tmp_path, monkeypatch):
        (tmp_path / "looking_ahead.py").write_text(LOOKING_AHEAD)
        monkeypatch.syspath_prepend(tmp_path)
        ffn = MEMORY | {"selector": {"kind": f"looking_ahead:{name}"}}
        assert re.match(said, refusal(ffn))
        model(ffn, objective="masked")
        if name == "Scored":
            model(MEMORY | {"selector": {"kind": "looking_ahead:Scored", "accept_leak": True}})

    def test_default_block_size_must_be_whole(self):
        assert "give block_size" in refusal({"kind": "sparse"}, width=10)

    def test_a_later_token_may_matter_in_a_masked_model(self):
        model(MEMORY | {"selector": "expert_choice"}, objective="masked")

    def test_split_by_blocks(self):
        config = model(MEMORY | {"active_blocks": 6, "shared_blocks": 3, "selector": "switch"})
        inner, outer = config.ffn.split(1 / 3, config)
        assert [(p.blocks, p.active_blocks, p.shared_blocks, p.block_size) for p in (inner, outer)] == [
            (8, 2, 1, 8),
            (16, 4, 2, 8),
        ]
        assert inner.selector == config.ffn.selector
        assert config.ffn.split(0.0, config)[0] is None
        assert config.ffn.split(0.0, config)[1].blocks == 24

    def test_split_parts_must_be_whole(self):
        config = model(MEMORY | {"active_blocks": 6})
        with pytest.raises(ValueError, match=r"blocks 24 cannot be split at 0\.3"):
            config.ffn.split(0.3, config)
        with pytest.raises(ValueError, match=r"active_blocks 6 cannot be split at 0\.25"):
            config.ffn.split(0.25, config)

    def test_settings_survive_writing(self):
        config = model(MEMORY | {"selector": {"kind": "switch", "balance": 0.5}})
        assert ModelConfig.parse(config.plain()) == config


class TestSparse:
    def test_output_bias_is_added_once_outside_the_gate(self, generator):
        ffn = sparse(bias=True, selector={"kind": "switch"})
        x = torch.randn(2, 7, 12, generator=generator)
        before = ffn(x, None, None).hidden
        with torch.no_grad():
            ffn.out_bias += 3
        assert torch.allclose(ffn(x, None, None).hidden, before + 3)

    def test_shared_blocks_are_a_dense_ffn_beside(self, generator):
        ffn = sparse(shared_blocks=3, bias=True)
        x = torch.randn(2, 7, 12, generator=generator)
        rows = x.flatten(0, 1)
        chosen = ffn.selector(rows, ffn.memory)
        routed = ffn.memory(rows, chosen.blocks, chosen.weights).view(x.shape)
        assert torch.allclose(ffn(x, None, None).hidden, routed + ffn.shared(x, None, None).hidden, atol=1e-6)
        assert ffn.shared.up.weight.shape == (24, 12)
        assert ffn.out_bias is None, "b2 is that of the shared FFN"

    def test_losses_are_weighted_and_stats_are_not(self, generator):
        ffn = sparse(selector={"kind": "switch", "balance": 0.25})
        found = ffn(torch.randn(2, 7, 12, generator=generator), None, None)
        assert torch.allclose(found.losses["balance"].detach(), 0.25 * found.stats["balance"])
        assert found.losses["balance"].requires_grad
        assert not any(value.requires_grad for value in found.stats.values())
        assert not sparse()(torch.randn(2, 7, 12, generator=generator), None, None).losses

    def test_token_ids_and_padding_reach_the_selector(self, generator):
        ffn = sparse(selector="rand_hash")
        x, ids = torch.randn(2, 7, 12, generator=generator), torch.arange(14).view(2, 7)
        real = torch.ones(2, 7, dtype=torch.bool)
        real[1, 4:] = False
        found = ffn(x, ids, real).hidden
        assert found[1, 4:].eq(0).all()
        assert torch.allclose(found[0], ffn(x[:1], ids[:1], None).hidden[0], atol=1e-6)
        assert not torch.allclose(found[0], ffn(x[:1], ids[1:], None).hidden[0], atol=1e-6)

    def test_a_hook_sees_selector_and_memory(self, generator):
        ffn, seen = sparse(), {}
        for name in ("selector", "memory"):
            ffn.get_submodule(name).register_forward_hook(
                lambda module, given, out, name=name: seen.update({name: (given, out)})
            )
        x = torch.randn(2, 7, 12, generator=generator)
        ffn(x, None, None)
        (rows, blocks, weights), out = seen["memory"]
        assert rows.shape == out.shape == (14, 12)
        assert blocks.shape == weights.shape == (14, 5)
        assert torch.equal(seen["selector"][1].blocks, blocks)

    def test_binary_gate_trains_only_chosen_keys(self, generator):
        """T13."""
        ffn = sparse(selector="avg_k", expansion=16)
        x = torch.randn(1, 3, 12, generator=generator)
        ffn(x, None, None).hidden.square().sum().backward()
        used = torch.zeros(96, dtype=torch.bool)
        used[ffn.selector(x[0], ffn.memory).blocks.flatten()] = True
        assert torch.equal(ffn.memory.keys.grad.abs().sum((1, 2)) > 0, used)
        assert not used.all()


@pytest.mark.parametrize("expansion", [4, 16])
@pytest.mark.parametrize(
    ("selector", "cells", "formula"),
    [
        ("avg_k", 64, lambda d, dm, k, B: 4 * d * k + 2 * d * B),
        ("switch", 64, lambda d, dm, k, B: 4 * d * k + 2 * d * B),
        ("rand_hash", 64, lambda d, dm, k, B: 4 * d * k),
        ("vanilla_m", 1, lambda d, dm, k, B: 2 * d * dm + 2 * d * k),
        ("lorkm", 1, lambda d, dm, k, B: 2 * (d * d // 8 + d // 8 * dm) + 2 * d * k),
        ("pkm", 1, lambda d, dm, k, B: 2 * d * d // 2 + d * dm**0.5 + k**2 + 2 * d * k),
        ("pkm_ffn", 1, lambda d, dm, k, B: 2 * d * d // 2 + d * dm**0.5 + k**2 + 4 * d * k),
    ],
)
def test_flops_of_every_selector(selector, cells, formula, expansion):
    """T15: the table of section 3.6; product keys below the bound the table has for their adds."""
    d = 256
    with torch.device("meta"):
        ffn = made({"kind": "sparse", "expansion": expansion, "block_size": cells, "selector": selector}, d)
    k = 4 * d
    expected = formula(d, expansion * k, k, expansion * k // cells)
    slack = k**2 if selector.startswith("pkm") else 0
    assert expected - slack <= ffn.flops() <= expected


def test_shares_of_selection_in_the_specification():
    """T15: E = 16, g = 64 -> 12.5 %; vanilla_m at d = 1024 -> 850 % of the active dense FFN."""
    shares = {}
    for selector, size in (("avg_k", 64), ("vanilla_m", 1)):
        with torch.device("meta"):
            ffn = made({"kind": "sparse", "expansion": 16, "block_size": size, "selector": selector}, 1024)
        shares[selector] = ffn.flops() / (4 * 1024 * 4096)
    assert shares["avg_k"] == 1.125
    assert shares["vanilla_m"] == 8.5


def test_flops_are_those_that_pytorch_counts(generator):
    from torch.utils.flop_counter import FlopCounterMode

    for ffn in (made({"kind": "dense", "gated": True}), sparse(active_blocks=24, shared_blocks=2, backend="reference")):
        with FlopCounterMode(display=False) as counter:
            ffn(torch.randn(1, 7, 12, generator=generator), None, None)
        assert counter.get_total_flops() == 7 * ffn.flops()


def case(**changes) -> Case:
    base = {"kind": "mix", "device": "cpu", "dtype": "float32", "block_size": 8, "blocks": 64, "active": 16}
    return Case(**(base | {"width": 128, "tokens": 2048} | changes))


class TestChoice:
    TABLE = (
        Measured(case(), {"masked": 2.0, "grouped": 1.0}),
        Measured(case(tokens=64), {"masked": 1.0, "grouped": 2.0}),
        Measured(case(dtype="bfloat16"), {"gather": 1.0}),
    )

    def test_the_fastest_at_the_nearest_shape(self):
        assert choose(case(tokens=1024), self.TABLE) == ("grouped", f"measured at {case()}")
        assert choose(case(tokens=128, blocks=128), self.TABLE).backend == "masked"
        assert choose(case(dtype="bfloat16", active=8), self.TABLE).backend == "gather"

    def test_of_two_near_shapes_the_nearer_counts(self):
        near = (Measured(case(), {"grouped": 1.0}), Measured(case(tokens=512), {"masked": 1.0}))
        assert choose(case(tokens=600), near).backend == "masked"
        assert choose(case(tokens=1800), near).backend == "grouped"
        assert choose(case(tokens=8192, width=512), near).why == f"measured at {case()}"  # each feature by itself

    def test_of_nearly_equal_ones_that_which_keeps_least(self):
        close = (Measured(case(), {"reference": 1.0, "masked": 1.03, "grouped": 1.06}),)
        assert choose(case(), close).backend == "masked"

    def test_far_from_what_was_measured_a_rule_holds_and_says_so(self):
        found = choose(case(block_size=256), self.TABLE)
        assert found == ("grouped", "a rule, nothing near was measured")
        assert choose(case(device="cuda"), self.TABLE).why.startswith("a rule")

    @pytest.mark.parametrize(
        ("changes", "backend"),
        [
            ({"tokens": 1}, "gather"),
            ({"active": 32}, "masked"),
            ({"block_size": 1}, "masked"),
            ({"block_size": 1, "blocks": 4096}, "gather"),
            ({}, "grouped"),
            ({"device": "cuda", "block_size": 16}, "masked"),
            ({"device": "cuda", "block_size": 64}, "grouped"),
            ({"device": "cuda", "block_size": 16, "blocks": 256, "dtype": "bfloat16"}, "grouped"),
            ({"device": "cuda", "block_size": 64, "blocks": 1024, "active": 64}, "masked"),
            ({"device": "cuda", "block_size": 64, "blocks": 1024, "active": 64, "dtype": "bfloat16"}, "grouped"),
            ({"device": "cuda", "block_size": 1, "blocks": 1024}, "masked"),
            ({"device": "cuda", "block_size": 1, "blocks": 4096}, "gather"),
        ],
    )
    def test_rules(self, changes, backend):
        assert choose(case(**changes), ()).backend == backend

    def test_a_memory_keeps_its_choice_and_tells_it_once(self, generator):
        pair = torch.nn.ModuleList([sparse(backend="auto"), sparse(backend="auto")])
        assert lines(pair) == []
        for count in (5, 6, 7, 33):
            for ffn in pair:
                ffn(torch.randn(1, count, 12, generator=generator), None, None)
        assert len(pair[0].memory.picker.chosen) == 2, "tokens count as powers of two: 8 and 64"
        chosen: dict[str, list[int]] = {}
        for one, made in pair[0].memory.picker.chosen.items():
            chosen.setdefault(made.backend, []).append(one.tokens)
        told = lines(pair)
        assert len(told) == len(chosen), "one for each back end of the one shape, however many memories have it"
        for line, (backend, tokens) in zip(told, chosen.items(), strict=True):
            count = " to ".join(map(str, sorted(tokens)))
            assert line.startswith(
                f"sparse FFN, 5 of 24 blocks of 8 cells, width 12, float32 on cpu for {count} tokens: {backend} ("
            )

    def test_a_forced_backend_is_used(self, generator, monkeypatch):
        monkeypatch.setitem(choice_backends(), "masked", lambda *given: torch.full((7, 12), 5.0))
        memory = Memory(12, 5, 3, picker=Picker("masked"))
        assert memory(torch.zeros(7, 12), torch.zeros(7, 1, dtype=torch.long), torch.ones(7, 1)).eq(5).all()

    def test_the_shipped_table_covers_the_cpu(self, monkeypatch, tmp_path):
        monkeypatch.setattr(choice, "user_path", lambda: tmp_path / "none.json")
        table = find_table()
        assert {row.case.kind for row in table} == {"mix", "read"}
        for tokens in (1, 64, 2048):
            assert choose(case(width=768, block_size=128, blocks=96, active=24, tokens=tokens), table).why != (
                "a rule, nothing near was measured"
            )

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{}",
            json.dumps({"rows": [case()._asdict() | {"seconds": {"fast": 1.0}}]}),
            '{"rows": [{"kind": "mix"}]}',
            '{"rows": [5]}',
        ],
    )
    def test_a_broken_table_is_one_line(self, text, tmp_path):
        path = tmp_path / "table.json"
        path.write_text(text)
        with pytest.raises(InputError, match=r"is no table of back ends: .*; write one with `transect tune`"):
            read_table(path)

    def test_a_broken_table_of_the_user_is_met_when_it_is_needed(self, tmp_path, monkeypatch):
        own = tmp_path / "own.json"
        own.write_text("{}")
        monkeypatch.setattr(choice, "user_path", lambda: own)
        forced, free, x = sparse(backend="reference"), sparse(), torch.zeros(1, 7, 12)
        assert forced(x, None, None).hidden.shape == x.shape
        with pytest.raises(InputError, match=r"own\.json is no table of back ends: 'rows'; write one with") as caught:
            free(x, None, None)
        assert "\n" not in str(caught.value)
        own.unlink()
        assert free(x, None, None).hidden.shape == x.shape

    def test_a_table_is_read_once_for_all_layers_and_again_when_it_changed(self, tmp_path, monkeypatch):
        own = tmp_path / "own.json"
        tune.tune(own, TestTune.CASES, repeats=1)
        monkeypatch.setattr(choice, "user_path", lambda: own)
        table, reads, plain = read_table(own), [], json.loads
        monkeypatch.setattr(choice.json, "loads", lambda text: reads.append(1) or plain(text))
        for ffn in (sparse(), sparse()):
            ffn(torch.zeros(1, 7, 12), None, None)
        assert not reads and read_table(own) is table
        own.write_text(own.read_text() + "\n")
        os.utime(own, ns=(1, 1))
        assert read_table(own) == table and len(reads) == 1

    def test_no_path_of_this_machine_is_among_the_settings(self):
        assert "ffn.backend_table is not a setting" in refusal(MEMORY | {"backend_table": "table.json"})


class TestTune:
    CASES = (case(tokens=4, blocks=3, active=2, width=5), case(kind="read", block_size=1, tokens=64, active=3, width=5))

    def test_writes_what_is_read_back(self, tmp_path):
        told = []
        path = tune.tune(tmp_path / "deep" / "table.json", self.CASES, lambda *given: told.append(given), repeats=1)
        table = read_table(path)
        assert [row.case for row in table] == list(self.CASES)
        assert set(table[1].seconds) <= {"reference", "gather"}
        assert [given[:2] for given in told] == [(1, 2), (2, 2)]
        assert "1 threads" in json.loads(path.read_text())["float32 on cpu"]["machine"]

    def test_rows_of_other_devices_and_dtypes_stay(self, tmp_path):
        path, halves = tmp_path / "table.json", case(dtype="bfloat16", tokens=4, blocks=3, active=2, width=5)
        path.write_text("no table")
        tune.tune(path, [halves], repeats=1)
        tune.tune(path, self.CASES, repeats=1)
        assert [row.case for row in read_table(path)] == [halves, *self.CASES]
        assert set(json.loads(path.read_text())) == {"bfloat16 on cpu", "float32 on cpu", "rows"}
        tune.tune(path, self.CASES[:1], repeats=1)
        assert [row.case for row in read_table(path)] == [halves, self.CASES[0]]

    def test_the_users_own_table_is_preferred(self, tmp_path, monkeypatch):
        own = tmp_path / "own.json"
        monkeypatch.setattr(choice, "user_path", lambda: own)
        monkeypatch.setattr(tune, "user_path", lambda: own)
        shipped = find_table()
        assert tune.tune(cases=self.CASES[:1], repeats=1) == own
        assert [row.case for row in find_table()] == [self.CASES[0]] != [row.case for row in shipped]

    def test_shipped_rows_stand_in_for_what_the_user_did_not_measure(self, tmp_path, monkeypatch):
        shipped, own, halves = find_table(), tmp_path / "own.json", case(dtype="bfloat16", tokens=4, width=5)
        tune.tune(own, [halves], repeats=1)
        monkeypatch.setattr(choice, "user_path", lambda: own)
        assert [row.case for row in find_table()] == [halves, *(row.case for row in shipped)]

    def test_typical_cases_are_distinct_and_fit(self):
        cases = list(tune.typical_cases())
        assert len(set(cases)) == len(cases) > 100
        assert all(one.active <= one.blocks for one in cases)
        assert {one.tokens for one in cases} == {1, 64, 2048}


def choice_backends() -> dict:
    from transect.models.memory.backends import MIXES

    return MIXES
