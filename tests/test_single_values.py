"""One value is enough for biased statistics, whatever has them together; not for unbiased ones."""

import numpy as np
import pytest

import bnfast
from tolerances import CLOSE_F32, CLOSE_F64

C = 3
WEIGHT, BIAS = np.array([2.0, -3.0, 0.5]), np.array([1.0, -2.0, 4.0])


def of_both_passes(name, *forward_only, weight=WEIGHT, bias=BIAS, backward_too=True):
    """Return a call of a function: y and, for a dy of ones, dx, dweight and dbias."""

    def both(x):
        forward, backward = (getattr(bnfast, f"{name}_{way}") for way in ("forward", "backward"))
        y, *saved = forward(x, *forward_only, weight, bias)
        first = forward_only if backward_too else ()
        return y, *backward(np.ones_like(x), x, *first, *saved, weight)

    return both


def renormalized(x):
    y, saved = bnfast.batch_renorm_forward(x, np.zeros(C), np.ones(C), WEIGHT, BIAS)
    return y, *bnfast.batch_renorm_backward(np.ones_like(x), x, saved, WEIGHT)


def across_iterations(x):
    y, saved = bnfast.cross_iteration_batch_norm_forward(x, weight=WEIGHT, bias=BIAS)
    return y, *bnfast.cross_iteration_batch_norm_backward(np.ones_like(x), x, saved, WEIGHT)


# What normalizes x of shape (N, C, 1) by statistics of one value each, where N is one of these.
BIASED = {
    "batch": (of_both_passes("batch_norm"), [1]),
    "conditional": (
        of_both_passes("conditional_batch_norm", weight=WEIGHT[None], bias=BIAS[None]),
        [1],
    ),
    "ghost": (of_both_passes("ghost_batch_norm", 1), [1, 4]),
    "cross iteration": (across_iterations, [1]),
    "instance": (of_both_passes("instance_norm"), [1, 4]),
    "group": (of_both_passes("group_norm", C, backward_too=False), [1, 4]),
    "renormalized": (renormalized, [1]),
    "whitened": (of_both_passes("decorrelated_batch_norm"), [1]),
    "nearly whitened": (of_both_passes("iterative_norm"), [1]),
}
CASES = [(call, n) for call, sizes in BIASED.values() for n in sizes]
IDS = [f"{name} {n}" for name, (_, sizes) in BIASED.items() for n in sizes]


@pytest.mark.parametrize(("call", "samples"), CASES, ids=IDS)
@pytest.mark.parametrize("size", [0.1, 1e6, 3e38, 1e-40])
def test_the_output_is_the_bias_and_has_no_gradient(isa, dtype, rng, call, samples, size):
    x = (size * rng.uniform(-1, 1, (samples, C, 1))).astype(dtype)
    y, dx, dweight, dbias = call(x)
    np.testing.assert_array_equal(y[..., 0], np.tile(BIAS, (samples, 1)))
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dweight, 0)
    np.testing.assert_array_equal(dbias, samples)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("value", [1e6, 0.1, 1 / 3, 1e30, 3e38, 1e-40])
def test_a_row_of_one_value_is_the_bias(isa, dtype, samples, value):
    x = np.full((samples, 1), value, dtype)
    weight, bias = np.array([2], dtype), np.array([3], dtype)
    y, mean, invstd = bnfast.layer_norm_forward(x, 1, weight, bias)
    dx, dweight, dbias = bnfast.layer_norm_backward(np.ones_like(x), x, 1, mean, invstd, weight)
    np.testing.assert_array_equal(y, 3)
    np.testing.assert_array_equal([*dx[:, 0], *dweight], 0)
    np.testing.assert_array_equal(dbias, samples)


@pytest.mark.parametrize("samples", [1, 4])
def test_around_0_one_value_is_its_own_root_mean_square(dtype, rng, samples):
    x = rng.normal(size=(samples, C, 1)).astype(dtype)
    of_rows = bnfast.rms_norm(x, 1, eps=1e-3)
    of_channels = bnfast.filter_response_norm(x, eps=1e-3)
    wide = x.astype(np.float64)
    tolerance = CLOSE_F32 if dtype == np.float32 else CLOSE_F64
    for y in (of_rows, of_channels):
        np.testing.assert_allclose(y, wide / np.sqrt(wide**2 + 1e-3), rtol=tolerance)


@pytest.mark.parametrize("filters", [1, C])
def test_a_filter_of_one_value_is_0(dtype, rng, filters):
    w = rng.normal(size=(filters, 1)).astype(dtype)
    for name in ("weight_standardization", "scaled_weight_standardization"):
        forward, backward = (getattr(bnfast, f"{name}_{way}") for way in ("forward", "backward"))
        y, mean, std = forward(w)
        dw, dgain = backward(np.ones_like(w), w, mean, std)
        np.testing.assert_array_equal(mean, w[:, 0])
        for zero in (y, std, dw, dgain):
            np.testing.assert_array_equal(zero, 0)


TRACKING = {
    "batch": lambda x, m, v, **k: bnfast.batch_norm(x, m, v, training=True, **k),
    "conditional": lambda x, m, v, **k: bnfast.conditional_batch_norm(
        x, None, None, m, v, training=True, **k
    ),
    "ghost": lambda x, m, v, **k: bnfast.ghost_batch_norm(x, 1, m, v, training=True, **k),
    "cross iteration": lambda x, m, v, **k: bnfast.cross_iteration_batch_norm(
        x, m, v, training=True, **k
    ),
    "last ghost": lambda x, m, v, **k: bnfast.ghost_batch_norm(
        np.concatenate([x, x, x]), 2, m, v, training=True, **k
    ),
}


@pytest.mark.parametrize("kind", TRACKING)
def test_the_biased_running_variance_takes_0(kind, dtype, rng):
    x = rng.normal(size=(1, C, 1)).astype(dtype)
    mean, var = np.zeros(C, dtype), np.ones(C, dtype)
    TRACKING[kind](x, mean, var, momentum=1.0, unbiased=False)
    np.testing.assert_array_equal(mean, x[0, :, 0])
    np.testing.assert_array_equal(var, 0)


@pytest.mark.parametrize("kind", [*TRACKING, "instance"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_the_unbiased_running_variance_of_one_value_is_refused(kind, momentum, dtype, rng):
    function = TRACKING.get(kind, bnfast.instance_norm)
    x, mean, var = rng.normal(size=(1, C, 1)).astype(dtype), np.zeros(C), np.ones(C)
    shape = (3, C, 1) if kind == "last ghost" else x.shape
    out = np.full(shape, 7, dtype)
    with pytest.raises(ValueError, match=r"x must have more than one value per channel.*unbiased"):
        function(x, mean, var, momentum=momentum, out=out)
    np.testing.assert_array_equal([mean, var], [np.zeros(C), np.ones(C)])
    np.testing.assert_array_equal(out, 7)


@pytest.mark.parametrize("samples", [1, 2, 10])
def test_instances_of_one_value_are_refused_in_batches_of_any_size(samples):
    layer = bnfast.InstanceNorm(C, affine=True, track_running_stats=True)
    before = layer.state_dict()
    for shape in ((samples, C), (samples, C, 1), (samples, C, 1, 1)):
        with pytest.raises(ValueError, match="more than one value per channel of each sample"):
            layer(np.ones(shape, np.float32))
    np.testing.assert_equal(layer.state_dict(), before)


@pytest.mark.parametrize("filters", [1, C])
def test_unbiased_filters_of_one_value_are_refused(filters):
    w, given = np.ones((filters, 1)), np.ones(filters)
    message = "w must have more than one value per filter for an unbiased variance"
    with pytest.raises(ValueError, match=message):
        bnfast.weight_standardization(w, unbiased=True)
    with pytest.raises(ValueError, match=message):
        bnfast.weight_standardization_backward(w, w, given, given, unbiased=True)


def test_batch_renormalization_and_whitening_track_what_is_biased(dtype, rng):
    x, mean = rng.normal(size=(1, C)).astype(dtype), np.zeros(C)
    std = np.ones(C)
    bnfast.batch_renorm(x, mean, std, training=True, momentum=1.0, eps=0.25)
    np.testing.assert_array_equal(mean, x[0])
    np.testing.assert_array_equal(std, 0.5)
    covariance = np.eye(C)[None].copy()
    options = {"training": True, "momentum": 1.0, "averaged": "covariance"}
    bnfast.decorrelated_batch_norm(x, mean, covariance, **options)
    np.testing.assert_array_equal(covariance, 0)


def test_a_layer_warns_of_one_value_unless_it_refuses_it():
    x = np.ones((1, C), np.float32)
    for options in ({"unbiased": False}, {"track_running_stats": False}):
        with pytest.warns(UserWarning, match="1 value per channel: their statistics are mostly"):
            y = bnfast.BatchNorm(C, **options)(x)
        np.testing.assert_array_equal(y, 0)
    with pytest.raises(ValueError, match="more than one value per channel"):
        bnfast.BatchNorm(C)(x)  # and the warning, if there were one, would be another error
