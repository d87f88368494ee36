"""What fine-tuning moves, what it gives back, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from labelled_texts import items, view
from transect.errors import InputError
from transect.tasks._classifier import Classifier
from transect.tasks._fine_tune import Settings, fine_tune, restored
from transect.tasks._sequences import padded, states
from transect.view import edits
from transect.view.view import View

FAST = Settings(lr=3e-3, epochs=2, batch_size=16, patience=None)


def weights(view: View) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in view.model.state_dict().items()}


def moved(view: View, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in view.model.state_dict().items() if not torch.equal(tensor, before[name])}


def trained(view: View, seed: int = 3, settings: Settings = FAST, **options) -> tuple:
    tuned = fine_tune(view, items(view, 61, 1), items(view, 19, 2), settings, seed, **options)
    return tuned, weights(view), [p.detach().clone() for p in tuned.classifier.parameters()]


def test_the_same_seed_gives_the_same_bits_whatever_ran_before():
    noisy = view("bert")
    for module in noisy.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1  # drawn anew for every step
    runs = []
    for seed in (3, 3, 5):
        state = torch.random.get_rng_state()
        with restored(noisy):
            runs.append(trained(noisy, seed))
        assert torch.equal(state, torch.random.get_rng_state())
        torch.rand(7)
        np.random.default_rng().random()
    (first, w, head), (again, w_again, head_again), (other, w_other, _) = runs
    assert all(torch.equal(w[name], w_again[name]) for name in w)
    assert all(map(torch.equal, head, head_again))
    assert (first.accuracy, first.nats) == (again.accuracy, again.nats)
    assert not all(torch.equal(w[name], w_other[name]) for name in w)
    assert first.nats != other.nats


def test_dropout_is_on_while_training_and_off_after_it():
    v = view("bert")
    with restored(v):
        plain = trained(v, settings=Settings(**vars(FAST) | {"dropout": 0.0}))[0]
    with restored(v):
        modes = []
        settings = Settings(**vars(FAST) | {"dropout": 0.5})
        dropped = trained(v, settings=settings, tick=lambda done, total: modes.append(v.model.training))[0]
        test = items(v, 31, 4)
        assert np.array_equal(dropped.predict(v, test), dropped.predict(v, test))
    assert plain.nats != dropped.nats
    assert all(modes) and len(modes) == 8 and not v.model.training


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_weights_come_back_after_an_exception(error: type[BaseException]):
    v = view("bert")
    before = weights(v)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise error

    with pytest.raises(error), restored(v):
        trained(v, tick=stop)
    assert not moved(v, before)
    assert not v.model.training
    assert all(p.requires_grad and p.grad is None for p in v.model.parameters())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "own/standard", "own/standard/masked"])
def test_edited_models_are_trained_and_restored_bit_for_bit(name: str):
    v = view(name)
    before = weights(v)
    with edits.swap(v, 0, 1), edits.remove(v, "ffn", 0), restored(v):
        tuned, *_ = trained(v, settings=Settings(**vars(FAST) | {"epochs": 1}))
        assert len(tuned.accuracy) == 1
        changed = weights(v)
        assert any(not torch.equal(a, b) for a, b in zip(before.values(), changed.values(), strict=True))
    assert not moved(v, before)


def test_an_edit_is_part_of_the_model_that_is_trained():
    """Without any layer's attention or FFN the first token, which is always the same, says nothing."""
    v = view("bert")
    training, test = items(v, 97, 1), items(v, 61, 2)
    settings = Settings(lr=3e-3, epochs=7, batch_size=16, patience=None)
    with restored(v):
        free = fine_tune(v, training, None, settings, 0).predict(v, test)
    with edits.remove(v, "attn", 0), edits.remove(v, "attn", 1), restored(v):
        cut = fine_tune(v, training, None, settings, 0).predict(v, test)
    assert (free == test.labels).mean() > 0.9
    assert len(set(cut.tolist())) == 1


def test_frozen_parts_do_not_move_and_all_others_do():
    v = view("bert")
    before = weights(v)
    for frozen, still in (
        (("ffn:0",), {"layer.0.intermediate.dense", "layer.0.output.dense"}),
        (("attn:1",), {"layer.1.attention.self", "layer.1.attention.output.dense"}),
        (("layer:1",), {"layer.1."}),
        (("embeddings", "ffn:1"), {"_embeddings.weight", "layer.1.intermediate.dense", "layer.1.output.dense"}),
    ):
        with restored(v):
            trained(v, frozen=frozen)
            changed = moved(v, before)
        base = {name for name in before if name.startswith("bert.")}
        expected = {name for name in base if not any(part in name for part in still)}
        assert expected - {name for name in base if "position_ids" in name or "token_type_ids" in name} <= changed
        held = base - expected
        assert held and not held & {name for name in changed if "word_embeddings" not in name or "embeddings" in frozen}


def test_frozen_layers_are_numbered_as_loaded():
    v = view("gpt2", layers=3)
    before = weights(v)
    with edits.order(v, (2, 0, 1)), restored(v):
        trained(v, frozen=("layer:2",))
        inside = list(v.layers[0].parameters())
        kept = {id(p) for p in inside}
        others = [p for layer in v.layers[1:] for p in layer.parameters()]
        assert not kept & {id(p) for p in others}
        still = [torch.equal(p, old) for p in inside for old in before.values() if old.shape == p.shape]
        assert sum(still) >= len(inside)
    assert not moved(v, before)


@pytest.mark.parametrize("part", ["ffn", "ffn:9", "head:1", "attn:x", "ffn2:0"])
def test_parts_that_are_none_are_refused(part: str):
    with pytest.raises(InputError, match="cannot be frozen"):
        trained(view("bert"), frozen=(part,))


def test_the_best_epoch_on_the_held_out_part_is_kept():
    v = view("gpt2")
    training, held_out = items(v, 23, 1), items(v, 23, 2)
    settings = Settings(lr=3e-2, epochs=9, batch_size=16, patience=None, warmup=0.0)
    found = []
    for seed in range(3):
        with restored(v):
            tuned = fine_tune(v, training, held_out, settings, seed)
            scores = [(a, -n) for a, n in zip(tuned.accuracy, tuned.nats, strict=True)]
            assert tuned.epoch == scores.index(max(scores)) + 1
            assert len(scores) == 9
            again = (tuned.predict(v, held_out) == held_out.labels).mean()
            assert again == tuned.accuracy[tuned.epoch - 1]
            found.append(tuned.epoch)
    assert min(found) < 9  # the last one is not always the best


def test_patience_ends_the_training():
    v = view("gpt2")
    ticks = []
    settings = Settings(lr=1e-12, epochs=9, batch_size=16, patience=2, dropout=0.0)
    with restored(v):
        tuned = fine_tune(v, items(v, 37, 1), items(v, 11, 2), settings, 0, tick=lambda *given: ticks.append(given))
    assert len(tuned.accuracy) < 9
    assert tuned.epoch == len(tuned.accuracy) - 2
    assert ticks[0] == (1, 27) and len(ticks) == 3 * len(tuned.accuracy)


def test_without_a_held_out_part_the_last_epoch_counts():
    v = view("gpt2")
    with restored(v):
        tuned = fine_tune(v, items(v, 37, 1), None, FAST, 0)
    assert (tuned.epoch, tuned.accuracy, tuned.nats) == (2, (), ())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_predictions_do_not_depend_on_the_batch(name: str):
    v = view(name, torch.float64)
    test = items(v, 43, 5)
    with restored(v):
        tuned, *_ = trained(v)
        logits = []
        for size in (1, 43):
            parts = [
                tuned.classifier(v, padded(v, test.sequences[start : start + size])).detach()
                for start in range(0, 43, size)
            ]
            logits.append(torch.cat(parts))
        assert torch.allclose(*logits, rtol=0, atol=1e-10)
        assert np.array_equal(tuned.predict(v, test, 1), tuned.predict(v, test, 17))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": -1e-5}, "above 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"warmup": 1.5}, "share of all steps"),
        ({"dropout": 1.0}, "below 1"),
        ({"clip": 0.0}, "above 0, or none"),
        ({"pool": "max"}, "one of auto, first, last, mean"),
        ({"adapters": 0}, "at least 1"),
        ({"patience": 0}, "at least 1 epoch"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        trained(view("bert"), settings=Settings(**vars(FAST) | change))


def test_weights_too_coarse_to_train_are_refused():
    v = view("gpt2")
    v.model.to(torch.bfloat16)
    with pytest.raises(InputError, match="bfloat16 weights"):
        trained(v)


def test_a_loss_that_is_not_finite_is_one_line():
    v = view("gpt2")
    before = weights(v)
    with pytest.raises(InputError, match="lower lr"), restored(v):
        trained(v, settings=Settings(**vars(FAST) | {"lr": 1e30, "clip": None}))
    assert not moved(v, before)
    assert all(p.grad is None for p in v.model.parameters())


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_pooling(pool: str):
    v = view("bert", torch.float64)
    some = items(v, 5, 1)
    batch = padded(v, some.sequences)
    classifier = Classifier(v, 2, pool=pool, dropout=0.0).eval()
    with torch.no_grad():
        found = classifier(v, batch)
        for number, (tokens,) in enumerate(some.sequences):
            hidden = v.run(torch.from_numpy(tokens.ids)[None])[0]
            vector = {"first": hidden[0], "last": hidden[-1], "mean": hidden[1:-1].mean(0)}[pool]
            if pool == "first":
                vector = torch.tanh(classifier.dense(vector))
            assert torch.allclose(found[number], classifier.map(vector), atol=1e-12)


def test_causal_models_read_the_last_token_by_default():
    assert Classifier(view("gpt2"), 2).pool == "last"
    assert Classifier(view("bert"), 2).pool == "first"


@pytest.mark.parametrize("name", ["bert", "own/standard/masked"])
def test_segments_reach_models_that_have_them(name: str):
    v = view(name)
    batch = padded(v, items(v, 3, 1).sequences)
    other = padded(v, items(v, 3, 1).sequences)
    other.types[:, 2:] = 1
    with torch.no_grad():
        same = torch.equal(states(v, batch), states(v, other))
        assert torch.equal(states(v, batch), v.run(batch.ids, batch.mask))
    settings = getattr(v.model.config, "settings", None)
    assert same == (settings is not None and settings.embedding.types < 2)
