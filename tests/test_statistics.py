"""Moments as a value, and the weight of a new batch."""

import copy
import io
import pickle

import numpy as np
import pytest

import bnfast
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


def test_moments_are_values(rng):
    moments = bnfast.moments(rng.normal(size=(5, 4)))
    assert moments == bnfast.Moments(moments.count, moments.mean, moments.m2)
    assert moments != bnfast.Moments(6, moments.mean, moments.m2)
    assert moments != 3
    with pytest.raises(ValueError, match="read-only"):
        moments.mean[0] = 1.0
    with pytest.raises(AttributeError, match="mean"):
        moments.mean = np.zeros(4)
    mean = np.zeros(4)
    made = bnfast.Moments(3, mean, np.ones(4))
    mean[:] = 7.0
    np.testing.assert_array_equal(made.mean, np.zeros(4))
    assert mean.flags.writeable


def test_one_count_stands_for_equal_ones():
    assert bnfast.Moments([3, 3], [1.0, 2.0], [0.0, 0.0]).count == 3
    np.testing.assert_array_equal(bnfast.Moments([3, 4], [1.0, 2.0], [0.0, 0.0]).count, [3, 4])


def test_sum_and_plus_merge(rng):
    x = rng.normal(size=(60, 4))
    parts = [bnfast.moments(part) for part in np.array_split(x, 7)]
    np.testing.assert_allclose(sum(parts).var, x.var(0), rtol=CLOSE_F64)
    assert parts[0] + parts[1] == parts[0].merge(parts[1])
    with pytest.raises(TypeError):
        parts[0] + 3


def test_channels_may_have_counts_of_their_own():
    a = bnfast.Moments([0, 2, 3], [0.0, 1.0, 4.0], [0.0, 2.0, 6.0])
    b = bnfast.Moments([2, 0, 3], [5.0, 0.0, 6.0], [8.0, 0.0, 6.0])
    for merged in (a + b, b + a):
        np.testing.assert_array_equal(merged.count, [2, 2, 6])
        np.testing.assert_array_equal(merged.mean, [5.0, 1.0, 5.0])
        np.testing.assert_array_equal(merged.m2, [8.0, 2.0, 18.0])
    np.testing.assert_array_equal(a.variance(1), [np.nan, 2.0, 3.0])
    np.testing.assert_array_equal(a.var, [0.0, 1.0, 2.0])


def test_float64_parts_far_from_zero_lose_nothing(rng):
    x = 1e9 + rng.normal(size=(3000, 4))
    whole = bnfast.moments(x)
    merged = sum(bnfast.moments(part) for part in np.array_split(x, 100))
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12)


def test_counts_are_exact_and_end_at_2_to_the_62():
    large = bnfast.Moments(2**62 - 1, [1.0], [0.0])
    assert (large + bnfast.Moments(1, [1.0], [0.0])).count == 2**62
    with pytest.raises(ValueError, match=r"count must be at most 2\*\*62 in all"):
        large + bnfast.Moments(2, [1.0], [0.0])
    with pytest.raises(ValueError, match="count must be from 0 to 4611686018427387904, got -1"):
        bnfast.Moments(-1, [1.0], [0.0])


@pytest.mark.parametrize(
    "value",
    [
        bnfast.Moments(3, [1.0, 2.0], [0.5, np.nan]),
        bnfast.Moments([3, 4], [1.0, 2.0], [0.5, 0.25]),
        bnfast.Moments(3, 1.5, 2.5),
        bnfast.moments(np.arange(12, dtype=np.uint8).reshape(4, 3)),
        bnfast.moments(1e9 + np.arange(12.0).reshape(4, 3)),
        bnfast.summary(np.arange(12, dtype=np.int16).reshape(4, 3)),
        bnfast.summary(np.array([[1.0, np.nan], [np.inf, np.nan]])),
        bnfast.summary(np.empty((0, 3))),
    ],
    ids=repr,
)
def test_what_is_saved_comes_back(tmp_path, value):
    kind = type(value)
    value.save(tmp_path / "saved.npz")
    copies = [
        kind.from_bytes(value.to_bytes()),
        kind.load(tmp_path / "saved.npz"),
        pickle.loads(pickle.dumps(value)),
        copy.deepcopy(value),
    ]
    other = bnfast.moments(
        np.full((2, *np.shape(value.mean)), 7.25), axis=tuple(range(1, 1 + np.ndim(value.mean)))
    )
    for again in copies:
        assert again == value
        assert type(again) is kind
        assert repr(again) == repr(value)
        if kind is bnfast.Moments:
            assert again + other == value + other
    with np.load(tmp_path / "saved.npz") as file:
        np.testing.assert_array_equal(file["mean"], value.mean)


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("f8", {"mean_low": np.zeros(1)}),
        ("u1", {"sum": np.array(["10"]), "sum_of_squares": np.array(["30"])}),
    ],
)
def test_files_of_version_0_2_are_read(code, more):
    """Written out, so that a later format must go on reading this one."""
    x, file = np.array([[1], [2], [3], [4]], code), io.BytesIO()
    of_moments = {"count": np.array(4), "mean": np.array([2.5]), "m2": np.array([5.0]), **more}
    extremes = {"minimum": np.ones(1), "maximum": np.full(1, 4.0), "nonfinite": np.zeros(1, int)}
    np.savez(file, Moments=np.array(1), **of_moments)
    assert bnfast.Moments.from_bytes(file.getvalue()) == bnfast.moments(x)
    file = io.BytesIO()
    np.savez(file, Summary=np.array(1), **of_moments, **extremes)
    assert bnfast.Summary.from_bytes(file.getvalue()) == bnfast.summary(x)


def test_bytes_of_something_else_are_refused(tmp_path):
    data = bnfast.moments(np.ones((3, 2))).to_bytes()
    for wrong in (b"", b"nothing", data[:-7], data[: len(data) // 2], data[1:]):
        with pytest.raises(ValueError, match="data must be of saved Moments, got"):
            bnfast.Moments.from_bytes(wrong)
    with pytest.raises(ValueError, match="data must be of saved Summary, got a file with Moments"):
        bnfast.Summary.from_bytes(data)
    with pytest.raises(TypeError, match="data must be bytes, got str"):
        bnfast.Moments.from_bytes("text")
    path = tmp_path / "weights.npz"
    np.savez(path, weights=np.ones(3))
    with pytest.raises(ValueError, match=r"weights.npz: data must be of saved Moments"):
        bnfast.Moments.load(path)
    np.savez(path, Moments=np.array(2), count=1, mean=np.ones(1), m2=np.ones(1))
    with pytest.raises(ValueError, match="of format 1, got 2"):
        bnfast.Moments.load(path)
    np.savez(path, Moments=np.array(1), count=1, mean=np.ones(1))
    with pytest.raises(ValueError, match="got a file without m2"):
        bnfast.Moments.load(path)
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match=r"weights.npz: data must be of saved Moments"):
        bnfast.Moments.load(path)


@pytest.mark.parametrize(
    ("code", "change", "message"),
    [
        ("f8", {"mean_low": np.zeros(1)}, r"mean_low must have the shape \(2,\)"),
        (
            "f8",
            {"mean_low": np.array(["0", "0"])},
            "mean_low must be float16, bfloat16, float32 or float64",
        ),
        ("f8", {"m2": np.zeros(3)}, "m2 must have the shape of mean"),
        ("f8", {"Moments": np.array([1, 1])}, r"of format 1, got \[1, 1\]"),
        ("u1", {"sum_of_squares": np.array(["1"])}, r"sum_of_squares must be .* shape \(2,\)"),
        ("u1", {"sum": np.ones(2)}, "sum must be the text of integers"),
        ("u1", {"sum": np.array(["a", "1"])}, "invalid literal"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(code, change, message):
    file = io.BytesIO()
    with np.load(io.BytesIO(bnfast.moments(np.ones((3, 2), code)).to_bytes())) as saved:
        np.savez(file, **{**saved, **change})
    with pytest.raises(ValueError, match=f"^data must be of saved Moments.*{message}"):
        bnfast.Moments.from_bytes(file.getvalue())


def test_a_changed_bit_makes_a_value_error_or_no_difference(rng):
    """Checksums find what is changed in the arrays; what else is changed, zipfile must survive."""
    value = bnfast.moments(np.arange(12, dtype=np.uint8).reshape(4, 3))
    data = value.to_bytes()
    for place in range(len(data)):
        changed = bytes([*data[:place], data[place] ^ 1 << rng.integers(8), *data[place + 1 :]])
        try:
            assert bnfast.Moments.from_bytes(changed) == value
        except ValueError as error:
            assert str(error).startswith("data must be of saved Moments")


def test_summaries_merge_with_summaries_alone(rng):
    x = rng.normal(size=(30, 3))
    x[4, 1] = np.inf
    first, second = bnfast.summary(x[:7]), bnfast.summary(x[7:])
    merged = first + second
    np.testing.assert_array_equal(merged.minimum, x.min(0))
    np.testing.assert_array_equal(merged.maximum, x.max(0))
    np.testing.assert_array_equal(merged.nonfinite, [0, 1, 0])
    assert type(bnfast.moments(x).merge(merged)) is bnfast.Moments
    with pytest.raises(TypeError, match="other must be a Summary, got Moments"):
        merged.merge(bnfast.moments(x))


def test_statistics_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"m2 must have the shape of mean, \(2,\), got \(3,\)"):
        bnfast.Moments(3, np.zeros(2), np.zeros(3))
    with pytest.raises(TypeError, match="count must be an integer"):
        bnfast.Moments(3.0, np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"count must be an integer or of shape \(2,\)"):
        bnfast.Moments([1, 2, 3], np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"minimum must have the shape \(2,\)"):
        bnfast.Summary(3, np.zeros(2), np.zeros(2), np.zeros(3), np.zeros(2), np.zeros(2, int))
    a, b = bnfast.moments(np.ones((3, 2, 2)), (1, 2)), bnfast.moments(np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"other must be of shape \(2, 2\), got \(2,\)"):
        a.merge(b)


def test_integers_of_a_whole_array_are_merged_exactly(rng):
    x = rng.integers(0, 256, (40, 30)).astype(np.uint8)
    parts = [bnfast.moments(part, None) for part in np.array_split(x, 7)]
    assert sum(parts) == bnfast.moments(x, None)
    assert bnfast.Moments.from_bytes(sum(parts).to_bytes()) == bnfast.moments(x, None)


def test_large_integers_of_a_whole_array_are_merged_exactly():
    x = np.broadcast_to(np.array([65535], np.uint16), (2**22,))
    one = bnfast.moments(np.array([65534], np.uint16), None)
    whole = sum([one, *[bnfast.moments(x, None)] * 3, one])
    n = 3 * 2**22
    assert whole.m2 == 2 * n / (n + 2)
    assert bnfast.Moments.from_bytes(whole.to_bytes()) == whole
