"""Speed, MFU, memory and norms, against a clock that is wound by hand and sums made by hand."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from own_models import own_model, settings
from transect.models.budget import budget
from transect.models.config import ModelConfig
from transect.recipes.recipe import Recipe
from transect.train.distributed.world import World
from transect.train.meters import Meters, StreamNorms, Throughput, Utilisation, gradient_norms, peak_memory, stream_sums
from transect.train.peaks import device_peak, peak_flops

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0  # a stamp: dividing by it must not pass

    def __call__(self) -> float:
        return self.now


def test_throughput_of_the_published_mistake():
    """999,424 tokens in 48.3 s are 20,692 a second, not 60.9."""
    clock = Clock()
    meter = Throughput(clock=clock)
    for _ in range(8):
        with meter.step(999_424 // 8):
            clock.now += 48.3 / 8
    assert meter.per_second() == pytest.approx(999_424 / 48.3, rel=1e-6)
    assert meter.seconds == pytest.approx(48.3, rel=1e-6)


def test_throughput_leaves_out_what_is_not_a_step():
    clock = Clock()
    meter = Throughput(clock=clock)
    for _ in range(3):
        with meter.step(100):
            clock.now += 2.0
        clock.now += 1000.0  # evaluation, a checkpoint
    assert meter.per_second() == pytest.approx(50.0)
    assert meter.seconds == pytest.approx(6.0)


def test_throughput_forgets_a_slow_start():
    clock = Clock()
    meter = Throughput(window=3, clock=clock)
    for seconds in (500.0, 1.0, 2.0, 1.0):
        with meter.step(70):
            clock.now += seconds
    assert meter.per_second() == pytest.approx(210 / 4)
    assert meter.seconds == pytest.approx(504.0)


def test_throughput_says_nothing_before_the_first_step():
    clock = Clock()
    meter = Throughput(clock=clock)
    assert meter.per_second() is None
    with suppress(KeyboardInterrupt), meter.step(5):
        clock.now += 1.0
        raise KeyboardInterrupt
    assert meter.per_second() is None and meter.seconds == 0
    with meter.step(5):
        pass
    assert meter.per_second() is None  # the clock stood still


def test_mfu_of_a_dense_model_by_hand():
    model = ModelConfig.parse(
        {"vocab_size": 97, "width": 24, "layers": 3, "attention": {"heads": 4}, "positions": "none"}
    )
    meter = Utilisation(model, 13, CPU, "float32", devices=2, peak=1e9)
    layer = 4 * 24 * 24 + 2 * 24 * 96
    keys = (13 + 1) / 2
    flops = 6 * (3 * (layer + 2 * 24 * keys) + 24 * 97)
    assert meter.flops == flops
    assert meter.of(1000.0) == pytest.approx(flops * 1000 / 2e9)
    assert meter.of(None) is None


def test_mfu_counts_only_the_blocks_that_a_token_gets():
    shape = {"vocab_size": 97, "width": 24, "layers": 1, "attention": {"heads": 4}}
    sparse = {"kind": "sparse", "block_size": 8, "active_blocks": 2, "selector": "rand_hash"}
    few, many = (
        Utilisation(ModelConfig.parse(shape | {"ffn": sparse | {"blocks": blocks}}), 13, CPU, "float32", peak=1.0)
        for blocks in (3, 61)
    )
    more = Utilisation(
        ModelConfig.parse(shape | {"ffn": sparse | {"blocks": 61, "active_blocks": 5}}), 13, CPU, "float32", peak=1.0
    )
    assert few.flops == many.flops
    assert more.flops - many.flops == 6 * 2 * 24 * 8 * 3


def test_mfu_of_a_masked_model_counts_the_head_where_it_predicts():
    model = settings("standard/masked")
    part = Utilisation(model, 13, CPU, "float32", predicted=0.15, peak=1.0).flops
    cost = budget(model, 13)
    head = cost.part("head").flops
    assert head > 0 and part == pytest.approx(3 * (cost.flops - 0.85 * head))


def test_mfu_is_missing_with_a_reason_where_the_peak_is_unknown():
    meter = Utilisation(settings("standard"), 13, CPU, "float32")
    assert meter.of(1000.0) is None
    assert "cpu" in meter.reason and "train.peak_flops" in meter.reason


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989.4e12),
        ("NVIDIA H200 NVL", "bfloat16", 835.5e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5e12),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4e12),
        ("NVIDIA H20", "bfloat16", 148e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA A10", "bfloat16", 125e12),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40", "bfloat16", 181.05e12),
        ("NVIDIA L40S", "bfloat16", 362.05e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "float32", 15.7e12),
        ("Tesla T4", "float32", 8.1e12),
        ("AMD Instinct MI300X", "bfloat16", 1307.4e12),
        ("AMD Instinct MI250X", "bfloat16", 191.5e12),
        ("Something New 9000", "bfloat16", None),
    ],
)
def test_peaks_by_name(name: str, precision: str, peak: float | None):
    assert peak_flops(name, precision) == peak


def test_float32_is_tf32_where_products_may_be_rounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert device_peak(cuda, "float32") == (19.5e12, "")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert device_peak(cuda, "float32") == (156e12, "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    peak, reason = device_peak(cuda, "bfloat16")
    assert peak is None and "V100" in reason and "bfloat16" in reason


def test_peak_memory_sees_what_was_taken():
    before = peak_memory(CPU)
    assert 10_000_000 < before < 10**12
    taken = torch.ones(before // 4 + 25_000_000)
    assert peak_memory(CPU) > before + 20_000_000
    del taken
    assert peak_memory(CPU) > before + 20_000_000


def test_stream_sums_by_hand():
    stream = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[6.0, 8.0], [float("nan"), 1.0]]])
    real = torch.tensor([[1, 1], [1, 0]]).bool()
    assert stream_sums([stream, 2 * stream], real).tolist() == [[17.0, 3.0], [34.0, 3.0]]
    assert stream_sums([stream[:1]]).tolist() == [[7.0, 2.0]]
    assert stream_sums([stream.to(torch.bfloat16)], real).dtype == torch.float64


@pytest.mark.parametrize("name", ["standard", "share/two", "sparse/top_k", "standard/masked", "parallel"])
@pytest.mark.parametrize("recompute", [False, True])
def test_stream_norms_change_nothing_and_add_up(name: str, recompute: bool, generator: torch.Generator):
    model = own_model(name).train()
    model.trunk.gradient_checkpointing = recompute
    ids = torch.randint(5, 40, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)

    def run(rows: slice):
        torch.manual_seed(0)
        model.zero_grad()
        made = model(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows])
        made.loss.backward()
        return made, [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    plain, gradients = run(slice(None))
    with StreamNorms(model) as whole:
        watched, others = run(slice(None))
    assert watched.hidden_states is None and torch.equal(plain.logits, watched.logits)
    assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    by_hand = torch.tensor(
        [[float(state.detach()[mask == 1].norm(dim=1).sum()), float(mask.sum())] for state in states]
    )
    torch.testing.assert_close(whole.sums.float(), by_hand, rtol=1e-5, atol=0)
    with StreamNorms(model) as parts:
        run(slice(0, 1))
        run(slice(1, 4))
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-5, atol=0)
    with StreamNorms(model) as asked:
        kept = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert len(kept.hidden_states) == len(states)  # whoever asks for them still gets them
    before = asked.sums.clone()
    run(slice(None))
    assert torch.equal(asked.sums, before)  # outside nothing is added


def test_gradient_norms_by_part():
    model = own_model("sparse/top_k")
    ids = torch.arange(5, 26).view(3, 7)
    model(input_ids=ids, labels=ids).loss.backward()
    found = gradient_norms(model)
    assert {"embeddings", "layers.0.attn", "layers.2.ffn", "layers.1.ffn_residual", "final_norm"} <= set(found)
    for part, norm in found.items():
        prefix = f"model.{part}."
        squares = [p.grad.double().square().sum() for n, p in model.named_parameters() if n.startswith(prefix)]
        assert norm == pytest.approx(float(sum(squares) ** 0.5), rel=1e-6) and norm > 0
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert sum(norm**2 for norm in found.values()) ** 0.5 == pytest.approx(float(total), rel=1e-6)
    model.zero_grad()
    assert gradient_norms(model) == {}


def recipe(**train) -> Recipe:
    model = {"vocab_size": 97, "width": 24, "layers": 2, "attention": {"heads": 4}, "max_positions": 31}
    texts = {"name": "a", "description": "b", "source": "c"}
    return Recipe.parse(texts | {"model": model, "train": {"batch_size": 6} | train})


def test_meters_of_a_run():
    clock = Clock()
    given = recipe(peak_flops=1e9)
    meters = Meters(given, 11, World.open(given.parallel, "cpu"), clock)
    speed, _, reason = meters.read()["tokens_per_second"]
    assert speed is None and reason
    assert meters.read()["mfu"][0] is None and meters.read()["mfu"][2]
    calls = SimpleNamespace(streams=None)
    model = own_model("standard")
    with meters.step(model, watched=False):
        clock.now += 4.0
        model(input_ids=torch.arange(5, 12)[None])
    assert meters.stream_norms is None
    with meters.step(model, watched=True):
        clock.now += 2.0
        calls.streams = model(input_ids=torch.arange(5, 12)[None], output_hidden_states=True).hidden_states
    read = meters.read()
    assert read["tokens_per_second"][0] == pytest.approx(2 * 66 / 6.0)
    flops = budget(given.model, 11).training_flops
    assert read["mfu"][0] == pytest.approx(flops * 22.0 / 1e9)
    assert meters.step_flops == pytest.approx(66 * flops) and meters.seconds == pytest.approx(6.0)
    assert read["peak_memory"][0] > 10_000_000
    assert meters.stream_norms == pytest.approx([float(s.detach().norm(dim=-1).mean()) for s in calls.streams])


def test_meters_without_a_peak_say_why():
    given = recipe()
    meters = Meters(given, 11, World.open(given.parallel, "cpu"))
    with meters.step(own_model("standard"), watched=False):
        pass
    value, _, reason = meters.read()["mfu"]
    assert value is None and "train.peak_flops" in reason
