"""Moments as a value, and the weight of a new batch."""

import numpy as np
import pytest

import bnfast
from bnfast.statistics import weight_of_new_batch
from tolerances import CLOSE_F64


def test_var_and_std_are_biased(rng):
    x = rng.normal(3, 2, (50, 4))
    moments = bnfast.moments(x)
    np.testing.assert_allclose(moments.var, x.var(0), rtol=CLOSE_F64)
    np.testing.assert_allclose(moments.std, x.std(0), rtol=CLOSE_F64)


@pytest.mark.parametrize("cut", [1, 7, 25, 49])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_merging_parts_gives_the_whole(rng, cut, offset):
    x = offset + rng.normal(size=(50, 4))
    whole = bnfast.moments(x)
    first, second = bnfast.moments(x[:cut]), bnfast.moments(x[cut:])
    for merged in (first.merge(second), second.merge(first)):
        assert merged.count == 50
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-9)


def test_empty_moments_change_nothing(rng):
    moments = bnfast.moments(rng.normal(size=(5, 4)))
    empty = bnfast.moments(np.empty((0, 4)))
    assert empty.count == 0
    np.testing.assert_array_equal(empty.mean, np.zeros(4))
    np.testing.assert_array_equal(empty.m2, np.zeros(4))
    assert moments.merge(empty) is moments
    assert empty.merge(moments) is moments
    np.testing.assert_array_equal(empty.merge(empty).var, 0)


def test_merging_different_numbers_of_channels():
    with pytest.raises(ValueError, match="other must have 4 channels, got 3"):
        bnfast.moments(np.ones((5, 4))).merge(bnfast.moments(np.ones((5, 3))))


def test_an_infinite_mean_stays_infinite():
    x = np.array([[np.inf, np.inf, 1.0], [1.0, 2.0, 3.0], [5.0, -np.inf, 5.0]])
    for cut in (1, 2):
        merged = bnfast.moments(x[:cut]).merge(bnfast.moments(x[cut:]))
        np.testing.assert_array_equal(merged.mean, [np.inf, np.nan, 3.0])
        np.testing.assert_array_equal(merged.mean, bnfast.moments(x).mean)
        assert np.isnan(merged.m2[:2]).all()


def test_merging_something_else():
    with pytest.raises(TypeError, match="other must be Moments, got tuple"):
        bnfast.moments(np.ones((5, 4))).merge((1, 2, 3))


def test_merging_changes_neither(rng):
    a, b = bnfast.moments(rng.normal(size=(5, 4))), bnfast.moments(rng.normal(size=(6, 4)))
    kept = a.mean.copy(), b.m2.copy()
    a.merge(b)
    np.testing.assert_array_equal(a.mean, kept[0])
    np.testing.assert_array_equal(b.m2, kept[1])


def test_the_weight_of_a_new_batch():
    assert weight_of_new_batch(0.1, 1) == weight_of_new_batch(0.1, 5) == 0.1
    assert [weight_of_new_batch(None, n) for n in (1, 2, 4)] == [1.0, 0.5, 0.25]
