"""Labelled texts and training after an edit: what can be learned again is, what cannot is not, nothing else moves."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

import transect as tx
from families import tiny_model
from labelled_texts import marked, tokenizer, view, written
from plants import only, text, value
from transect.after_edit import Transfer
from transect.data import batches
from transect.data.order import Purpose, draws
from transect.effects import recovered
from transect.errors import InputError
from transect.plan import make
from transect.probes._continued import Course, descend, intact, load, tensors, within
from transect.probes._on_text import PIECE
from transect.probes.ablation import Ablation
from transect.probes.commutativity import Commutativity
from transect.results import Table
from transect.tasks._classifier import Classifier
from transect.tasks._fine_tune import restored
from transect.tasks._sequences import padded
from transect.train.step import noise_seed
from transect.view.view import View

MASK_ID = 4
QUICK = {"epochs": 4, "lr": 3e-3, "batch_size": 16, "length": 31}


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Texts whose one marked word says their class."""
    return written(tmp_path_factory.mktemp("marks"), marked(149, 1), marked(61, 2))


def bits(v: View) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors(v)]


def measured(v: View, probe, documents: int = 31) -> Table:
    before = bits(v)
    table = tx.measure(v, [probe], text(documents))
    assert all(map(torch.equal, before, tensors(v)))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in v.model.parameters())
    assert not any(module.training for module in v.model.modules())
    return table


# accuracy


def test_what_can_be_learned_again_is(marks: str):
    """Only attention brings the mark to the first token: one layer of it is enough, none is not."""
    transfer = Transfer(data=marks, **QUICK)
    probe = Ablation(parts=("attn",), schedules=("from_below",), transfer=transfer, mask_id=MASK_ID)
    table = measured(view(), probe)
    assert value(table, metric="accuracy", variant="intact") > 0.9
    first, both = ({"layer": 0, "layer_to": last} for last in (0, 1))
    one = {where: value(table, metric="accuracy", **first, variant=f"zero/from_below{where}") for where in STAGES}
    assert one[""] < 0.7 and one["/continued"] > 0.9
    for stage in STAGES:
        row = only(table, metric="accuracy", **both, variant=f"zero/from_below{stage}")
        assert row.value < 0.7
        assert (row.unit, row.n, row.documents, row.split, row.domain) == ("1", 61, 61, "test", "made")
        assert row.edit == "zero attn 0-1" and row.element == "attn" and row.low <= row.value <= row.high
        change = value(table, metric="accuracy_change", **both, variant=f"zero/from_below{stage}")
        assert change == pytest.approx(row.value - value(table, metric="accuracy", variant=f"intact{stage}"))
    change = {
        stage: value(table, metric="accuracy_change", **first, variant=f"zero/from_below{stage}") for stage in STAGES
    }
    share = only(table, metric="recovered", **first)
    assert share.value == pytest.approx(1 - change["/continued"] / change[""]) and share.value > 0.8
    assert abs(value(table, metric="recovered", **both)) < 0.3
    # ablated models start from the model itself, as did the one that was fine-tuned as long
    same = [only(table, metric="accuracy", variant=f"intact{stage}").value for stage in STAGES]
    assert same[0] == same[1]
    assert len(table.where(metric="accuracy")) == 2 * 3


STAGES = ("", "/continued")


def twins() -> View:
    """A BERT of three layers, the first two with the same weights."""
    model = tiny_model("bert", torch.float32, 0, 3)
    model.bert.encoder.layer[1].load_state_dict(model.bert.encoder.layer[0].state_dict())
    return View(model, tokenizer(True), name="twins")


def test_layers_that_are_equal_change_places_for_nothing(marks: str):
    transfer = Transfer(data=marks, after_edit="direct", freeze=("layer:0", "layer:1"), **QUICK)
    options = {"kinds": ("adjacent", "repeat"), "mask_id": MASK_ID}
    v = twins()
    table = measured(v, Commutativity(transfer=transfer, **options))
    assert only(table, metric="accuracy_change", edit="swap 0,1").value == 0
    changes = [row.value for row in table.where(metric="accuracy_change") if row.edit != "swap 0,1"]
    assert len(changes) == 4 and any(changes)
    assert not [row for row in table if str(row.variant).endswith("/continued") or row.metric == "recovered"]
    plain = measured(v, Commutativity(**options))  # the same rows as ever beside the new ones
    kept = [row for row in table if not row.metric.startswith("accuracy")]
    assert [(r.metric, r.edit, r.value, r.stderr, r.n) for r in plain] == [
        (r.metric, r.edit, r.value, r.stderr, r.n) for r in kept
    ]


def state_after(v: View, probe, number: int = 0, documents: int = 31):
    """The state of a probe after one of its trainings."""
    (item,) = make(v, [probe], text(documents)).passes
    state = probe.start(item.settings[0], None)
    probe.train(state, item.settings[0], number, lambda tokens: None)
    return state.after, item.settings[0]


def plain_descent(parameters: list, losses: Iterator, steps: int, lr: float, seed: int) -> None:
    """AdamW as the paper has it, written out."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam, warmup = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-6), round(0.1 * steps)
    schedule = get_linear_schedule_with_warmup(adam, warmup, steps).lr_lambdas[0]
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = lr * ((step + 1) / warmup if step < warmup else schedule(step))
        adam.zero_grad()
        torch.manual_seed(noise_seed(seed, step, 0))
        for part in next(losses):
            part().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()


def test_all_layers_frozen_is_the_head_alone(marks: str):
    v = view("bert")
    frozen = ("layer:0", "layer:1", "embeddings")
    transfer = Transfer(data=marks, freeze=frozen, **QUICK | {"epochs": 7, "batch_size": 149})
    state, setting = state_after(v, Ablation(parts=("ffn",), transfer=transfer, mask_id=MASK_ID))
    base, head = copy.deepcopy(v.base), Classifier(v, 2, seed=setting.seed)
    norm = base.embeddings.LayerNorm
    norm_and_head = [*norm.parameters(), *head.parameters()]
    base.train()
    head.train()
    labels = torch.from_numpy(state.training.labels)

    def losses() -> Iterator:
        for epoch in range(7):
            chosen = _order(setting.seed, epoch, len(labels))
            given = padded(v, [state.training.sequences[n] for n in chosen])

            def loss(given=given, chosen=chosen) -> torch.Tensor:
                hidden = base(input_ids=given.ids, attention_mask=given.mask.long(), token_type_ids=given.types)[0]
                return nn.functional.cross_entropy(
                    head.map(head.dropout(torch.tanh(head.dense(hidden[:, 0])))), labels[chosen]
                )

            yield [loss]

    plain_descent(norm_and_head, losses(), 7, transfer.lr, setting.seed)
    for name, weight in head.state_dict().items():
        assert torch.allclose(state.classifier[name], weight, rtol=0, atol=1e-6), name
    moved = {
        name
        for (name, old), new in zip(v.model.named_parameters(), state.weights, strict=False)
        if not torch.equal(old, new)
    }
    assert moved == {"bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"}


def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.argsort(draws(seed, Purpose.ORDER, np.array([epoch]), np.arange(count)))


# the model's own loss


def test_the_intact_model_is_trained_as_by_a_plain_loop():
    """Dropout included, to the bit of the seed."""
    v = view("bert", torch.float64)
    transfer = Transfer(steps=11, lr=1e-3, batch_size=11)
    state, setting = state_after(v, Commutativity(kinds=("adjacent",), transfer=transfer, mask_id=MASK_ID))
    assert len(setting.train_sequences) > 11 and not set(setting.train_sequences) & set(setting.edit_sequences)
    model, everything = copy.deepcopy(v.model).train(), setting.train_sequences

    def losses() -> Iterator:
        taken = np.concatenate([everything[_order(setting.seed, epoch, len(everything))] for epoch in range(11)])
        for step in range(11):
            pieces = list(batches(setting.data, taken[11 * step : 11 * (step + 1)], PIECE))
            count = sum(int((piece.target >= 0).sum()) for piece in pieces)
            yield [lambda piece=piece, count=count: _masked_loss(model, piece) / count for piece in pieces]

    plain_descent(list(model.parameters()), losses(), 11, transfer.lr, setting.seed)
    for (name, expected), found in zip(model.named_parameters(), state.weights, strict=False):
        assert torch.allclose(found, expected, rtol=0, atol=1e-6), name
    assert not torch.allclose(state.weights[0], next(v.model.parameters()), rtol=0, atol=1e-4)


def _masked_loss(model: nn.Module, piece) -> torch.Tensor:
    logits = model(input_ids=piece.ids, attention_mask=piece.mask.long()).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), piece.target.flatten(), ignore_index=-1, reduction="sum")


def test_rows_on_text_compare_models_trained_equally_long():
    transfer = Transfer(steps=13, lr=3e-3, batch_size=8)
    probe = Ablation(parts=("ffn",), methods=("linear", "freeze"), schedules=("single",), transfer=transfer)
    v = view("gpt2")
    table = measured(v, probe, documents=61)
    intact_loss = value(table, metric="loss", variant="intact/continued")
    assert intact_loss < value(table, metric="loss", variant="intact") - 1
    for method in ("linear", "freeze"):
        where = {"layer": 0, "variant": f"{method}/single/continued"}
        loss, change = (value(table, metric=metric, **where) for metric in ("loss", "loss_change"))
        assert change == pytest.approx(loss - intact_loss) and change != 0
        assert value(table, metric="kl", **where) > 0 and value(table, metric="agreement", **where) <= 1
    assert not table.where(variant="freeze/single").rows  # without training it is the model itself
    share = only(table, metric="recovered", layer=0)
    costs = [value(table, metric="loss_change", layer=0, variant=f"linear/single{stage}") for stage in STAGES]
    assert share.reason is not None or share.value == pytest.approx(1 - costs[1] / costs[0])
    rows = table.where(variant="linear/single/continued").rows
    assert {row.metric for row in rows} == {"loss", "loss_change", "kl", "agreement", "state_change", "recovered"}


def test_no_part_of_a_cost_within_its_error_is_recovered():
    rng = np.random.default_rng(0)
    before = np.column_stack([np.zeros(43), 1 + 0.1 * rng.normal(size=43), rng.normal(size=43)])
    found = recovered(before, before * 0.25, np.arange(43, dtype=np.uint64), 0)
    like = tx.Row(metric="x", value=None, unit="1", reason="?")
    first = found.row(1, like, None)
    assert first.value == pytest.approx(0.75) and first.stderr == pytest.approx(0, abs=1e-12)
    assert "not above its error" in str(found.row(2, like, None).reason)
    assert found.row(1, like, "it broke").reason == "it broke"


# every edit


def courses(v: View) -> dict[str, Course]:
    """The edits that models are trained under, by name."""
    transfer = Transfer(steps=1)
    methods = ("zero", "noise", "mean", "linear", "cosine_adam", "two_linear", "relu_control", "freeze")
    parts = ("ffn", "attn", "layer", "head", "ffn_up")
    probe = Ablation(
        parts=parts, methods=methods, schedules=("single",), residual_weights=(0.5,), transfer=transfer, train_epochs=1,
    )  # fmt: skip
    plan = make(v, [probe], text(61))
    (item,) = plan.passes
    setting = item.settings[0]
    state = fitted(plan, probe)
    cases = [*probe.cases(v), *probe.frozen_cases(v)]
    found = {case.row().edit: probe._course(state, case, setting) for case in cases if case.layers == (0,)}
    orders = Commutativity(kinds=("pairs", "repeat"))
    found |= {one.edit: Course(variant) for one, variant in zip(
        orders.arrangements(v.num_layers, 0), orders.variants(None, setting), strict=True)}  # fmt: skip
    return found


def fitted(plan, probe: Ablation):
    """The state behind the stages that come before the edits."""
    from transect.measure import _run_batch

    (item,) = plan.passes
    state = probe.start(item.settings[0], None)
    for stage in item.stages:
        if stage.phase != "edit":
            for batch in batches(item.data, stage.sequences, stage.batch_size):
                _run_batch(plan.view, item, stage, [state], batch)
            probe.turn(state, item.settings[0], stage.phase)
    return state


def test_every_edit_can_be_learned_under():
    """Gradients go through each: what is before it, what is behind it and what it put in place moves."""
    v = view("gpt2")
    ids = torch.arange(5, 16)[None]
    before = bits(v)
    for name, course in courses(v).items():
        if "noise ffn_up" in name:
            assert course.reason == "the random weights of ffn_up cannot be held still in training"
            continue
        assert course.reason is None, name
        maps = [parameter.detach().clone() for parameter in course.maps.parameters()]
        with restored(v):
            with within(v, course):
                given = {n: p.detach().clone() for n, p in v.model.named_parameters() if "maps_of_edits" not in n}
                out = v.run(ids, head=True)

                def losses(step: int) -> Iterator:
                    yield v.run(ids, head=True).log_softmax(-1)[..., 7].mean(), 11

                transfer = Transfer(steps=2, lr=1e-2)
                module = nn.ModuleDict({"model": v.model})
                assert descend(v, module, losses, 2, transfer, course.frozen, 0, lambda tokens: None) is None
                assert not torch.equal(v.run(ids, head=True), out), name
                moved = {n for n, p in v.model.named_parameters() if n in given and not torch.equal(p, given[n])}
            assert "transformer.wte.weight" in moved and "transformer.ln_f.weight" in moved, name
            if not name.startswith(("repeat", "zero layer")):
                assert any(n.startswith("transformer.h.1.") for n in moved), name
            held = {
                "freeze ffn 0": "h.0.mlp",
                "freeze attn 0": "h.0.attn",
                "freeze layer 0": "h.0.",
                "noise ffn 0": "h.0.mlp",
            }
            if name in held:
                assert not [n for n in moved if held[name] in n], name
        assert len(maps) == len(list(course.maps.parameters()))
        for old, new in zip(maps, course.maps.parameters(), strict=True):
            assert not torch.equal(old, new), name
        assert all(map(torch.equal, before, tensors(v))), name
        assert not hasattr(v.base, "maps_of_edits")


def test_maps_give_at_first_what_the_fit_gave():
    v = view("gpt2", torch.float64)
    transfer = Transfer(steps=1)
    methods = ("mean", "linear", "cosine_adam", "mse_adam", "two_linear", "relu_control")
    probe = Ablation(parts=("ffn", "layer"), methods=methods, schedules=("single",), transfer=transfer, train_epochs=1)
    plan = make(v, [probe], text(61))
    state = fitted(plan, probe)
    ids = torch.arange(5, 16)[None]
    for case in probe.cases(v):
        plain = probe._variant(case, tuple(range(v.num_layers)), state.fitted, 0)
        found = []
        for course in (Course(plain), probe._course(state, case, plan.passes[0].settings[0])):
            with torch.no_grad(), within(v, course):
                found.append(v.run(ids, head=True))
        assert torch.allclose(*found, rtol=0, atol=1e-10), case
        with torch.no_grad():
            assert not torch.allclose(found[0], v.run(ids, head=True), rtol=0, atol=1e-4)


def test_training_that_fails_says_so_and_spoils_nothing():
    v = view("gpt2")
    before = bits(v)

    def losses(step: int) -> Iterator:
        yield v.run(torch.arange(5, 16)[None], head=True).mean() / (0.0 if step == 2 else 1.0), 11

    def stopped(tokens: int) -> None:
        raise KeyboardInterrupt

    module, transfer = nn.ModuleDict({"model": v.model}), Transfer(steps=5, lr=1e-3)
    with restored(v), within(v, intact(v)):
        reason = descend(v, module, losses, 5, transfer, (), 0, lambda tokens: None)
    assert reason == "training at lr 0.001 leaves finite numbers in step 3; lower transfer.lr"
    with pytest.raises(KeyboardInterrupt), restored(v), within(v, intact(v)):
        descend(v, module, losses, 5, transfer, (), 0, stopped)
    assert all(map(torch.equal, before, tensors(v)))
    assert not v.model.training and all(parameter.grad is None for parameter in v.model.parameters())
    load(v, before)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"after_edit": "later"}, "after_edit is 'later'; allowed are direct, continued"),
        ({"after_edit": "direct"}, "give data, or after_edit: continued"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"length": 3}, "length is 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, why: str):
    with pytest.raises(InputError, match=f"^transfer: .*{why}"):
        Transfer(**options)


def test_freeze_needs_training():
    with pytest.raises(InputError, match="freeze says what training leaves alone"):
        Ablation(methods=("freeze",))
