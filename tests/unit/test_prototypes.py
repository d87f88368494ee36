"""Prototypes: the worked example, batch cuts and order, halves of the data, and states that have no direction."""

import pytest
import torch
from torch import Tensor

import transect.metrics.prototypes as module
from transect.metrics.prototypes import PrototypeSums, hits, prototypes

WIDE = torch.float64
TOY = torch.tensor([[2, -1], [4, -2], [0, 1], [0, 2], [4, 1], [-1, 0]], dtype=WIDE)
KEEP_TWO = torch.tensor([0, 0, 1, 1, 1, -1])  # class C was seen once
KEEP_ALL = torch.tensor([0, 0, 1, 1, 1, 2])


def fitted(states: Tensor, classes: Tensor, half: Tensor, number: int, cuts: int = 1) -> PrototypeSums:
    sums = PrototypeSums.empty(number, states.shape[1])
    for batch in zip(states.chunk(cuts), classes.chunk(cuts), half.chunk(cuts), strict=True):
        sums.add(*batch)
    return sums


def halves(n: int) -> Tensor:
    return torch.arange(n) % 2


def planted(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy states of 11 classes and of no class, of very different lengths."""
    classes = torch.randint(-1, 11, (997,), generator=generator)
    centres = torch.randn(12, 13, generator=generator, dtype=WIDE)
    noise = torch.randn(997, 13, generator=generator, dtype=WIDE)
    length = torch.randn(997, 1, generator=generator, dtype=WIDE).mul(3).exp()
    half = torch.randint(0, 2, (997,), generator=generator)
    return (centres[classes] + 1.5 * noise) * length, classes, half


@pytest.mark.parametrize(("classes", "accuracy"), [(KEEP_TWO, 0.8), (KEEP_ALL, 5 / 6)])
def test_worked_example(classes: Tensor, accuracy: float):
    known = prototypes(fitted(TOY, classes, halves(6), int(classes.max()) + 1))
    same, _, _ = hits(TOY, classes, halves(6), known)
    assert int(same.sum()) / int((classes >= 0).sum()) == pytest.approx(accuracy)
    assert not same[4]  # it would be a hit if raw states were averaged


def test_averages_are_of_directions():
    sums = fitted(TOY, KEEP_TWO, torch.zeros(6, dtype=torch.int64), 2)
    assert sums.counts.tolist() == [[2, 3], [0, 0]]
    expected = torch.tensor([[2, -1], [4 / 17**0.5, 2 + 1 / 17**0.5]], dtype=WIDE)
    torch.testing.assert_close(prototypes(sums).same, expected / expected.norm(dim=1, keepdim=True))


def test_agrees_with_cosines_one_by_one(generator: torch.Generator):
    states, classes, half = planted(generator)
    units = states / states.norm(dim=1, keepdim=True)
    same, split, counted = hits(states, classes, half, prototypes(fitted(states, classes, half, 11)))
    for row in range(0, 997, 29):
        own = int(classes[row])
        everyone = torch.stack([units[classes == c].mean(0) for c in range(11)])
        others = torch.stack([units[(classes == c) & (half != half[row])].mean(0) for c in range(11)])
        nearest = [int((means / means.norm(dim=1, keepdim=True) @ units[row]).argmax()) for means in (everyone, others)]
        assert [bool(same[row]), bool(split[row])] == [own == found for found in nearest]
        assert bool(counted[row]) is (own >= 0)
    assert 0.2 < float(split[counted].double().mean()) < float(same[classes >= 0].double().mean()) < 0.95


def test_batch_cuts_change_nothing_and_order_only_rounding(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    states, classes, half = planted(generator)
    whole = fitted(states, classes, half, 11)
    cut = fitted(states, classes, half, 11, cuts=17)
    assert torch.equal(cut.sums, whole.sums) and torch.equal(cut.counts, whole.counts)
    order = torch.randperm(997, generator=generator)
    mixed = fitted(states[order], classes[order], half[order], 11)
    torch.testing.assert_close(mixed.sums, whole.sums, rtol=1e-13, atol=1e-13)
    before = hits(states, classes, half, prototypes(whole))
    after = hits(states[order], classes[order], half[order], prototypes(mixed))
    monkeypatch.setattr(module, "_BLOCK", 70)
    blocks = hits(states, classes, half, prototypes(whole))
    for one, two, three in zip(before, after, blocks, strict=True):
        assert torch.equal(one[order], two) and torch.equal(one, three)


def test_prediction_from_the_other_half_is_not_helped_by_the_state_itself(generator: torch.Generator):
    """Pure noise: own prototypes know their few states, the other half's do not."""
    states = torch.randn(1021, 211, generator=generator)
    classes = torch.arange(1021) % 101
    half = torch.arange(1021) // 101 % 2
    same, split, counted = hits(states, classes, half, prototypes(fitted(states, classes, half, 101)))
    assert bool(counted.all())
    assert float(same.double().mean()) > 0.9
    assert float(split.double().mean()) < 0.05


def test_class_of_one_half_leaves_the_total():
    states = torch.tensor([[1.0, 0], [1, 0.1], [0, 1]])
    classes, half = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    same, split, counted = hits(states, classes, half, prototypes(fitted(states, classes, half, 3)))
    assert same.tolist() == [True, True, True]
    assert split.tolist() == [True, True, False]
    assert counted.tolist() == [True, True, False]


def test_empty_half_counts_nothing():
    states, classes, half = torch.eye(3), torch.arange(3), torch.zeros(3, dtype=torch.int64)
    same, split, counted = hits(states, classes, half, prototypes(fitted(states, classes, half, 3)))
    assert bool(same.all()) and not bool(split.any()) and not bool(counted.any())


def test_class_without_prototype_is_never_predicted():
    """Class 0 cancels: a zero vector would win against negative cosines."""
    states = torch.tensor([[0.0, 1], [0, -1], [1, 0], [-1, 0.5], [1, 0]])
    classes, half = torch.tensor([0, 0, 1, 1, 1]), torch.zeros(5, dtype=torch.int64)
    known = prototypes(fitted(states, classes, half, 2))
    assert known.same_known.tolist() == [False, True]
    assert hits(states, classes, half, known)[0].tolist() == [False, False, True, True, True]


def test_zero_states_add_nothing_and_miss():
    states = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 0], [0, 0]])
    classes, half = torch.tensor([0, 0, 1, 0, 2]), torch.tensor([0, 0, 0, 1, 1])
    sums = fitted(states, classes, half, 3)
    assert sums.counts.tolist() == [[1, 1, 0], [1, 0, 0]]
    same, split, counted = hits(states, classes, half, prototypes(sums))
    assert same.tolist() == [False, True, True, True, False]
    assert split.tolist() == [False, True, False, True, False]
    assert counted.tolist() == [True, True, False, True, False]


def test_ties_go_to_the_lowest_class():
    states = torch.tensor([[0.0, 3], [0, 2], [0, 1]])
    classes, half = torch.tensor([2, 1, 1]), torch.tensor([0, 0, 1])
    assert hits(states, classes, half, prototypes(fitted(states, classes, half, 3)))[0].tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_length_does_not_matter_in_low_precision(dtype: torch.dtype, generator: torch.Generator):
    states = torch.randn(211, 7, generator=generator).to(dtype)
    classes, half = torch.randint(0, 5, (211,), generator=generator), halves(211)
    scaled = states * 2.0 ** torch.randint(-20, 20, (211, 1), generator=generator).to(dtype)
    one, two = fitted(states, classes, half, 5), fitted(scaled, classes, half, 5)
    assert torch.equal(one.sums, two.sums)
    assert torch.equal(hits(states, classes, half, prototypes(one))[0], hits(scaled, classes, half, prototypes(two))[0])


def test_packs_into_tensors(generator: torch.Generator):
    sums = fitted(*planted(generator), 11)
    again = PrototypeSums(**sums.pack())
    assert torch.equal(again.sums, sums.sums) and torch.equal(again.counts, sums.counts)
