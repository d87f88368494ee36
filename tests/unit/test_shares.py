"""Increments and shares: the paper's worked example, telescoping, and draws on the leading axes."""

import numpy as np
import pytest

from transect.metrics.shares import increments, shares

LEVELS = np.array([0.10, 0.22, 0.30, 0.28, 0.50])
OWNERS = ("attn", "ffn", "attn", "ffn")


def test_worked_example():
    found = shares(LEVELS, OWNERS)
    np.testing.assert_allclose(increments(LEVELS), [0.12, 0.08, -0.02, 0.22], atol=1e-15)
    np.testing.assert_allclose(found.cumulative_mha, [0.12, 0.12, 0.10, 0.10], atol=1e-15)
    np.testing.assert_allclose(found.cumulative_ffn, [0, 0.08, 0.08, 0.30], atol=1e-15)
    assert found.total == pytest.approx(0.4)
    assert found.share_ffn == pytest.approx(0.75)
    assert found.share_mha == pytest.approx(0.25)


def test_draws_are_computed_one_by_one():
    draws = np.random.default_rng(3).normal(size=(5, 7, 12))
    owners = np.random.default_rng(4).choice(["attn", "ffn"], 11)
    found = shares(draws, owners)
    assert found.cumulative_ffn.shape == (5, 7, 11)
    np.testing.assert_allclose(found.cumulative_mha + found.cumulative_ffn, draws[..., 1:] - draws[..., :1], atol=1e-12)
    np.testing.assert_allclose(found.share_mha + found.share_ffn, 1, atol=1e-9)
    single = shares(draws[2, 3], owners)
    np.testing.assert_array_equal(increments(draws)[2, 3], increments(draws[2, 3]))
    for name in ("cumulative_mha", "cumulative_ffn", "total", "share_mha", "share_ffn"):
        np.testing.assert_array_equal(getattr(found, name)[2, 3], getattr(single, name))


def test_layers_with_one_or_three_sublayers():
    only = shares(LEVELS, ("attn",) * 4)
    assert (only.share_mha, only.share_ffn) == (1, 0)
    mixed = shares(LEVELS, ("attn", "attn", "ffn", "ffn"))
    assert mixed.share_mha == pytest.approx(0.5) and mixed.share_ffn == pytest.approx(0.5)


def test_falling_scores_have_shares_too():
    assert shares(-LEVELS, OWNERS).share_ffn == pytest.approx(0.75)


def test_total_of_zero_has_no_share():
    found = shares(np.array([[0.2, 0.5, 0.2], [0.2, 0.3, 0.6]]), ("attn", "ffn"))
    assert np.isnan(found.share_mha[0]) and np.isnan(found.share_ffn[0])
    assert found.share_mha[1] == pytest.approx(0.25)


def test_increments_of_one_place_are_none():
    assert increments(np.array([0.3])).shape == (0,)


@pytest.mark.parametrize("owners", [("attn", "ffn"), ("attn", "ffn", "attn", "mlp"), ()])
def test_owners_must_fit(owners: tuple[str, ...]):
    with pytest.raises(ValueError, match="4 steps owned by"):
        shares(LEVELS, owners)


def test_one_level_has_no_shares():
    with pytest.raises(ValueError, match="0 steps"):
        shares(LEVELS[:1], ())
