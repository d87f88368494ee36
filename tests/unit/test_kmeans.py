"""Streaming k-means: scikit-learn as rival, planted clusters, the update by hand, resuming, and states that repeat."""

import io

import pytest
import torch
from sklearn.cluster import MiniBatchKMeans as Rival
from torch import Tensor

from transect.errors import InputError
from transect.metrics.kmeans import (
    BATCH,
    MiniBatchKMeans,
    add_rows,
    assign,
    buffer_rows,
    finish_together,
    inertia,
    partial_fit_together,
    start,
)


def blobs(generator: torch.Generator, n: int = 12_000, d: int = 16) -> Tensor:
    """A mixture of 150 clusters that overlap."""
    return (2 * torch.randn(150, d, generator=generator))[torch.randint(150, (n,), generator=generator)] + isotropic(
        generator, n, d
    )


def isotropic(generator: torch.Generator, n: int = 12_000, d: int = 16) -> Tensor:
    return torch.randn(n, d, generator=generator)


def tokens(generator: torch.Generator, n: int = 12_000, d: int = 16) -> Tensor:
    """Unit states around 3,000 types whose frequencies fall as 1/rank, with noise of very unequal size."""
    kinds = torch.multinomial(1 / torch.arange(1, 3001.0), n, True, generator=generator)
    noise = torch.randn(n, d, generator=generator) * (1 + torch.randn(n, 1, generator=generator).exp())
    states = torch.randn(3000, d, generator=generator)[kinds] + 0.3 * noise
    states *= torch.arange(1, d + 1.0) ** -0.5
    return states / states.norm(dim=1, keepdim=True)


def fitted(states: Tensor, clusters: int, seed: int = 0) -> MiniBatchKMeans:
    model = MiniBatchKMeans(clusters, seed)
    for batch in states.split(BATCH):
        model.partial_fit(batch)
    return model


def saved(model: MiniBatchKMeans) -> MiniBatchKMeans:
    """The model after a file."""
    file = io.BytesIO()
    torch.save(model.pack(), file)
    file.seek(0)
    return MiniBatchKMeans.unpack(torch.load(file))


# --- quality


@pytest.mark.parametrize(("clusters", "seed"), [(7, 0), (7, 1), (61, 2), (211, 3)])
@pytest.mark.parametrize("kind", [isotropic, blobs, tokens])
def test_one_pass_is_as_good_as_scikit_learn(kind, clusters: int, seed: int, generator: torch.Generator):
    states = kind(generator)
    rival = Rival(n_clusters=clusters, batch_size=1024, init="k-means++", n_init=1, random_state=seed)
    theirs = torch.from_numpy(rival.fit(states.numpy()).cluster_centers_)
    ours = fitted(states, clusters, seed).finish()
    assert len(ours) == clusters
    assert inertia(states, ours) <= 1.01 * inertia(states, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clusters_far_apart_are_found(dtype: torch.dtype, generator: torch.Generator):
    middles = 100 * torch.randn(53, 7, generator=generator, dtype=dtype)
    truth = torch.randint(53, (9001,), generator=generator)
    states = middles[truth] + 0.1 * torch.randn(9001, 7, generator=generator, dtype=dtype)
    model = fitted(states, 53)
    centres = model.finish()
    assert centres.dtype == dtype
    labels = assign(states, centres)
    assert len(torch.unique(torch.stack([truth, labels], 1), dim=0)) == 53  # one label a cluster, one cluster a label
    means = torch.stack([states[labels == k].mean(0) for k in range(53)])
    torch.testing.assert_close(centres, means, rtol=1e-4, atol=1e-3)
    assert torch.equal(model.counts, torch.bincount(labels))


# --- the steps


def test_update_by_hand(generator: torch.Generator):
    states = isotropic(generator, buffer_rows(11) + BATCH, 5).double()
    head, tail = states[:-BATCH], states[-BATCH:]
    model = fitted(head, 11)
    before, counts = model.finish().clone(), model.counts.clone()
    assert torch.equal(counts, torch.bincount(assign(head, before), minlength=11))
    model.partial_fit(tail)
    nearest = torch.cdist(tail, before).argmin(1)
    for k in range(11):
        rows = tail[nearest == k]
        assert int(model.counts[k]) == int(counts[k]) + len(rows)
        moved = before[k] + (rows.sum(0) - len(rows) * before[k]) / int(model.counts[k])
        torch.testing.assert_close(model.centres[k], moved)


def test_start_improves_on_drawn_rows_and_is_a_fixed_point_nearly(generator: torch.Generator):
    states = blobs(generator, 3001)
    centres = start(states, 31, [0])[0]
    drawn = states[torch.randperm(3001, generator=generator)[:31]]
    labels = assign(states, centres)
    means = torch.stack([states[labels == k].mean(0) for k in range(31)])
    assert inertia(states, centres) < 0.8 * inertia(states, drawn)
    assert inertia(states, means) > 0.99 * inertia(states, centres)


def test_seeds_differ_and_start_alike_alone_or_together(generator: torch.Generator):
    states = blobs(generator, 3001)
    together = start(states, 13, [3, 4])
    assert torch.equal(together[1], start(states, 13, [4])[0])
    assert not torch.allclose(together[0], together[1])


def test_assign_takes_the_nearest_and_the_lowest_of_equals():
    centres = torch.tensor([[4.0, 0], [0, 0], [0, 2], [0, 0]])
    states = torch.tensor([[2.0, 0], [0.1, 0], [0, 1], [0, 1.5], [9, 9]])
    assert assign(states, centres).tolist() == [0, 1, 1, 2, 0]
    assert inertia(states, centres) == pytest.approx(4 + 0.01 + 1 + 0.25 + 106)


def test_assign_agrees_with_distances_beyond_one_block(generator: torch.Generator):
    states, centres = isotropic(generator, 2503, 7).double(), isotropic(generator, 83, 7).double()
    distances = torch.cdist(states, centres, compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(assign(states, centres), distances.argmin(1))
    assert torch.equal(torch.cat([assign(part, centres) for part in states.split(97)]), distances.argmin(1))
    assert inertia(states, centres) == pytest.approx(float(distances.min(1).values.square().sum()))


def test_a_massive_dimension_costs_no_digits(generator: torch.Generator):
    states, centres = isotropic(generator, 1009, 7), isotropic(generator, 83, 7)
    offset = torch.tensor([0, 0, 4096.0, 0, 0, 0, 0])
    shifted, far = states + offset, centres + offset
    exact = inertia(shifted.double(), far.double())
    assert inertia(shifted, far) == pytest.approx(exact, rel=1e-4)
    assert float((assign(shifted, far) == assign(shifted.double(), far.double())).double().mean()) > 0.999


def test_rows_are_added_where_indices_repeat():
    total = torch.zeros(3, 2)
    add_rows(total, torch.tensor([2, 0, 2]), torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    assert total.tolist() == [[3, 4], [0, 0], [6, 8]]


# --- the same data, the same centres


def test_same_data_same_centres_alone_or_together(generator: torch.Generator):
    states = blobs(generator, 8009)
    models = [MiniBatchKMeans(23, seed) for seed in (5, 6)]
    for batch in states.split(BATCH):
        partial_fit_together(models, batch)
    found = finish_together(models)
    for seed, centres in zip((5, 6), found, strict=True):
        assert torch.equal(centres, fitted(states, 23, seed).finish())
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("rows", [2 * BATCH, 7 * BATCH])
def test_resuming_is_bit_equal(rows: int, generator: torch.Generator):
    """Once while the buffer fills, once after the start."""
    states = blobs(generator, 8009)
    model = fitted(states[:rows], 23)
    assert model.started is (rows > buffer_rows(23))
    resumed = saved(model)
    for batch in states[rows:].split(BATCH):
        resumed.partial_fit(batch)
    assert torch.equal(resumed.finish(), fitted(states, 23).finish())
    assert resumed.rows == 8009


def test_states_may_be_overwritten_after_they_were_given(generator: torch.Generator):
    states = blobs(generator, 2003)
    expected = fitted(states, 13).finish()
    model = MiniBatchKMeans(13, 0)
    for batch in states.split(BATCH):
        model.partial_fit(batch)
        batch.zero_()
    assert torch.equal(model.finish(), expected)


# --- few states, states that repeat


def test_short_data_start_from_what_there_is(generator: torch.Generator):
    states = blobs(generator, 1009)
    model = fitted(states, 13)
    assert not model.started
    assert torch.equal(model.finish(), start(states, 13, [0])[0])
    assert torch.equal(model.finish(), model.centres)


def test_as_many_states_as_clusters_are_their_own_centres(generator: torch.Generator):
    states = isotropic(generator, 17, 5)
    assert sorted(fitted(states, 17).finish().tolist()) == sorted(states.tolist())


@pytest.mark.parametrize("rows", [0, 5])
def test_fewer_states_than_clusters_are_refused(rows: int):
    with pytest.raises(InputError, match=rf"{rows} states for 7 clusters; give at least as many"):
        fitted(torch.ones(rows, 3), 7).finish()


def test_no_clusters_are_refused():
    with pytest.raises(InputError, match="0 clusters given"):
        MiniBatchKMeans(0, 0)


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_repeated_states_get_one_centre_each(offset: float, generator: torch.Generator):
    """Fewer distinct states than clusters, at sizes where rounding alone would tell equal ones apart."""
    distinct = torch.randn(29, 11, generator=generator) + offset
    truth = torch.randint(29, (8009,), generator=generator)
    centres = fitted(distinct[truth], 41).finish()
    assert len(centres) == 29
    labels = assign(distinct[truth], centres)
    assert len(torch.unique(torch.stack([truth, labels], 1), dim=0)) == 29
    torch.testing.assert_close(centres[labels], distinct[truth], rtol=1e-5, atol=1e-4)


def test_constant_states_are_one_cluster():
    torch.testing.assert_close(fitted(torch.full((8009, 3), 0.3), 5).finish(), torch.full((1, 3), 0.3))


def test_states_that_come_later_fill_the_centres_that_were_missing(generator: torch.Generator):
    early, late = torch.randn(2, 13, 7, generator=generator, dtype=torch.float64)
    rows = torch.arange(buffer_rows(26)) % 13
    model = fitted(torch.cat([early[rows], late[rows]]), 26)
    centres = model.finish()
    assert len(centres) == 26
    assert inertia(torch.cat([early, late]), centres) < 1e-12
    assert torch.equal(model.counts, torch.bincount(assign(torch.cat([early[rows], late[rows]]), centres)))
