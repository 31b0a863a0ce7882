"""Batch norm: every kernel against the reference, on awkward sizes; and the layer."""

import copy
import pickle
import warnings

import numpy as np
import pytest

import bnfast
from bnfast import BatchNorm
from bnfast import _reference as reference
from cases import batches, small_batches
from oracle import check_backward, check_forward, check_moments
from tolerances import CLOSE_F32, CLOSE_F64, ROUNDED_F32


@pytest.mark.parametrize(("shape", "axis"), batches(), ids=str)
def test_moments_agree_with_the_reference(isa, dtype, rng, shape, axis):
    check_moments(rng.normal(3, 2, shape).astype(dtype), axis)


@pytest.mark.parametrize(("shape", "axis"), batches(), ids=str)
def test_forward_agrees_with_the_reference(isa, dtype, rng, shape, axis):
    x = rng.normal(3, 2, shape).astype(dtype)
    weight, bias = rng.normal(size=(2, shape[axis])).astype(dtype)
    check_forward(x, weight, bias, axis=axis)


@pytest.mark.parametrize(("shape", "axis"), batches(), ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_backward_agrees_with_the_reference(isa, dtype, rng, shape, axis, training):
    x = rng.normal(3, 2, shape).astype(dtype)
    dy = rng.normal(0.5, 1, shape).astype(dtype)
    weight = rng.normal(size=shape[axis]).astype(dtype)
    check_backward(dy, x, weight, axis, training)


@pytest.mark.parametrize(("shape", "axis"), batches(), ids=str)
def test_evaluation_is_the_formula_to_the_bit(isa, dtype, rng, shape, axis):
    x = rng.normal(3, 2, shape).astype(dtype)
    channels = shape[axis]
    mean, weight, bias = rng.normal(size=(3, channels)).astype(dtype)
    var = rng.uniform(0.5, 2, channels).astype(dtype)
    invstd = 1 / np.sqrt(var.astype(np.float64) + 1e-5)
    along = [1] * len(shape)
    along[axis] = channels
    scale = (weight.astype(np.float64) * invstd).astype(dtype).reshape(along)
    expected = (x - mean.reshape(along)) * scale + bias.reshape(along)
    np.testing.assert_array_equal(
        bnfast.batch_norm(x, mean, var, weight, bias, axis=axis), expected
    )


@pytest.mark.parametrize(("shape", "axis"), small_batches(), ids=str)
@pytest.mark.parametrize("given", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_weight_and_bias_are_each_optional(dtype, rng, shape, axis, given, training):
    x = rng.normal(3, 2, shape).astype(dtype)
    channels = shape[axis]
    mean, var = np.zeros(channels, dtype), np.ones(channels, dtype)
    weight, bias = rng.normal(size=(2, channels)).astype(dtype)
    if given in ("bias", "neither"):
        weight = np.ones_like(weight)
    if given in ("weight", "neither"):
        bias = np.zeros_like(bias)
    expected = bnfast.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, axis=axis)
    y = bnfast.batch_norm(
        *(x, mean, var),
        weight if given in ("both", "weight") else None,
        bias if given in ("both", "bias") else None,
        *(training,),
        axis=axis,
    )
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("parameter_dtype", [np.float32, np.float64])
def test_parameters_of_either_dtype_for_data_of_either_dtype(isa, dtype, rng, parameter_dtype):
    x = rng.normal(3, 2, (4, 5, 9)).astype(dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    weight, bias = rng.normal(size=(2, 5)).astype(np.float32).astype(parameter_dtype)
    y = check_forward(x, weight, bias)
    same = bnfast.batch_norm_forward(x, weight.astype(np.float32), bias.astype(np.float64))[0]
    np.testing.assert_array_equal(y, same)
    check_backward(dy, x, weight)


def test_float32_mean_and_invstd_are_taken_by_backward(dtype, rng):
    x = rng.normal(3, 2, (4, 5, 9)).astype(dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    _, mean, invstd = bnfast.batch_norm_forward(x)
    narrow = bnfast.batch_norm_backward(dy, x, mean.astype(np.float32), invstd.astype(np.float32))
    wide = bnfast.batch_norm_backward(dy, x, mean, invstd)
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(a, b, atol=CLOSE_F32)


@pytest.mark.parametrize("ndim", range(2, 8))
def test_any_rank_and_any_channel_axis(isa, dtype, rng, ndim):
    shape = (3, 2, 4, 2, 3, 2, 2)[:ndim]
    x = rng.normal(3, 2, shape).astype(dtype)
    dy = rng.normal(size=shape).astype(dtype)
    for axis in range(-ndim, ndim):
        weight, bias = rng.normal(size=(2, shape[axis])).astype(dtype)
        check_moments(x, axis)
        check_forward(x, weight, bias, axis=axis)
        check_backward(dy, x, weight, axis)


def test_a_hand_computed_batch():
    x = np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)
    y, mean, invstd = bnfast.batch_norm_forward(x, np.float32([2, 1]), np.float32([0, 5]), eps=3.0)
    np.testing.assert_array_equal(mean, [2.0, 20.0])
    np.testing.assert_array_equal(invstd, [0.5, 1 / np.sqrt(103.0)])
    np.testing.assert_array_equal(y[:, 0], [-1.0, 1.0])


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (3, 3, 0), (0, 3), (0,)])
def test_an_empty_batch_gives_an_empty_array(dtype, shape):
    x = np.empty(shape, dtype)
    channels = shape[1] if len(shape) > 1 else 0
    y, mean, invstd = bnfast.batch_norm_forward(x)
    assert y.shape == shape
    assert y.dtype == dtype
    assert mean.shape == invstd.shape == (channels,)
    assert np.isfinite(invstd).all()
    assert bnfast.moments(x).count == 0
    dx, dweight, dbias = bnfast.batch_norm_backward(x, x, mean, invstd)
    assert dx.shape == shape
    np.testing.assert_array_equal(dweight, np.zeros(channels))
    np.testing.assert_array_equal(dbias, np.zeros(channels))
    y = bnfast.batch_norm(x, np.zeros(channels), np.ones(channels))
    assert y.shape == shape


@pytest.mark.parametrize("eps", [1e-30, 1e-5, 0.1, 3.0])
def test_the_invstd_of_an_empty_batch_is_that_of_a_variance_of_zero(eps):
    _, _, invstd = bnfast.batch_norm_forward(np.zeros((0, 3)), eps=eps)
    np.testing.assert_array_equal(invstd, 1 / np.sqrt(eps))


def test_more_values_than_an_int_can_count(rng):
    image = rng.normal(5, 1, (1, 2, 32768)).astype(np.float32)
    got = bnfast.moments(np.broadcast_to(image, (70000, 2, 32768)))
    assert got.count == 70000 * 32768 > 2**31
    np.testing.assert_allclose(got.mean, image.mean((0, 2), np.float64), rtol=1e-7)
    np.testing.assert_allclose(got.var, image.var((0, 2), np.float64), rtol=ROUNDED_F32)


def test_array_likes_are_accepted_as_input():
    class Wrapper:
        def __array__(self, dtype=None, copy=None):
            return np.array([[1.0], [3.0]])

    np.testing.assert_allclose(bnfast.batch_norm_forward(Wrapper())[0], [[-1], [1]], rtol=CLOSE_F32)
    np.testing.assert_allclose(
        bnfast.batch_norm_forward([[1.0], [3.0]])[0], [[-1], [1]], rtol=CLOSE_F32
    )


PARAMETERS = ("running_mean", "running_var", "weight", "bias")


def images(rng, dtype=np.float32, shape=(8, 3, 5, 5)):
    return rng.normal(3, 2, shape).astype(dtype)


def test_a_new_layer_is_pytorchs(dtype):
    layer = BatchNorm(3, dtype=dtype)
    for array, value in (
        *((layer.weight, 1), (layer.bias, 0)),
        *((layer.running_mean, 0), (layer.running_var, 1)),
    ):
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, np.full(3, value))
    assert (layer.eps, layer.momentum, layer.axis, layer.unbiased) == (1e-5, 0.1, 1, True)
    assert layer.num_batches_tracked == 0
    assert layer.weight_grad is None
    assert layer.bias_grad is None
    assert layer.training


def test_training_is_the_functional_operation(dtype, rng, axis):
    x = images(rng, dtype)
    channels = x.shape[axis]
    layer = BatchNorm(channels, axis=axis, dtype=dtype)
    layer.weight[...], layer.bias[...] = rng.normal(size=(2, channels))
    mean, var = np.zeros(channels, dtype), np.ones(channels, dtype)
    for number in range(1, 4):
        expected = bnfast.batch_norm(
            x, mean, var, layer.weight, layer.bias, training=True, axis=axis
        )
        np.testing.assert_array_equal(layer(x), expected)
        np.testing.assert_array_equal(layer.running_mean, mean)
        np.testing.assert_array_equal(layer.running_var, var)
        assert layer.num_batches_tracked == number


def test_evaluation_uses_the_running_statistics_and_leaves_them_alone(dtype, rng):
    layer = BatchNorm(3, dtype=dtype)
    layer(images(rng, dtype))
    before = layer.state_dict()
    x = images(rng, dtype)
    expected = bnfast.batch_norm(x, layer.running_mean, layer.running_var)
    np.testing.assert_array_equal(layer.eval()(x), expected)
    np.testing.assert_equal(layer.state_dict(), before)
    assert not layer.training
    assert layer.train().training
    assert not layer.train(False).training


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("channels", [3, 300])
def test_a_changed_parameter_counts_from_the_next_call_on(isa, dtype, rng, axis, name, channels):
    layer = BatchNorm(channels, axis=axis).eval()
    shape = (8, channels, 5) if axis == 1 else (8, 5, channels)
    x, dy = images(rng, dtype, shape), images(rng, dtype, shape)

    def check():
        for _ in range(2):
            y, dx = layer(x), layer.backward(dy)
            mean, var, weight, bias = (getattr(layer, n) for n in PARAMETERS)
            expected = bnfast.batch_norm(x, mean, var, weight, bias, eps=layer.eps, axis=axis)
            np.testing.assert_array_equal(y, expected)
            invstd = 1 / np.sqrt(np.float64(1 if var is None else var) + layer.eps)
            scale = (1 if weight is None else weight) * invstd
            np.testing.assert_allclose(dx, dy * np.expand_dims(scale, -1 if axis == 1 else 0), 1e-5)

    check()
    getattr(layer, name)[-1] += 3  # in place, one value
    check()
    setattr(layer, name, rng.uniform(1, 2, channels))  # another array, of another dtype
    check()
    if name in ("weight", "bias"):
        setattr(layer, name, None)
        check()
    layer.eps = 0.5
    check()
    x = x.astype(np.float64 if dtype == np.float32 else np.float32)
    dy = dy.astype(x.dtype)
    check()
    layer.train()(x + 1)
    layer.eval()
    check()


def test_evaluation_may_be_followed_by_a_change_before_backward(rng):
    layer = BatchNorm(3).eval()
    x, dy = images(rng), images(rng)
    layer(x)
    layer(x)
    expected, mean = dy * np.float32(1 / np.sqrt(1 + 1e-5)), layer.running_mean.copy()
    layer.weight *= 2
    layer.running_var *= 2
    layer.running_mean += 1
    np.testing.assert_allclose(layer.backward(dy), expected, rtol=ROUNDED_F32)
    invstd = np.full(3, 1 / np.sqrt(1 + 1e-5))
    dweight = bnfast.batch_norm_backward(dy, x, mean, invstd, training=False)[1]
    np.testing.assert_array_equal(layer.weight_grad, dweight)


def test_without_tracking_evaluation_uses_the_batch(rng):
    x = images(rng)
    layer = BatchNorm(3, track_running_stats=False)
    trained = layer(x)
    assert layer.running_mean is None
    assert layer.num_batches_tracked is None
    np.testing.assert_array_equal(layer.eval()(x), trained)
    dy = images(rng)
    dx = layer.backward(dy)
    layer.train()(x)
    np.testing.assert_array_equal(layer.backward(dy), dx)


def test_without_affine_there_is_nothing_to_learn(rng):
    layer = BatchNorm(3, affine=False)
    x = images(rng)
    np.testing.assert_array_equal(layer(x), bnfast.batch_norm_forward(x)[0])
    layer.backward(x)
    assert layer.weight is layer.bias is layer.weight_grad is layer.bias_grad is None


def test_momentum_none_averages_all_batches(rng):
    layer = BatchNorm(3, momentum=None, dtype=np.float64)
    batches = [images(rng, np.float64) for _ in range(5)]
    for batch in batches:
        layer(batch)
    means = [b.mean((0, 2, 3)) for b in batches]
    variances = [b.var((0, 2, 3), ddof=1) for b in batches]
    np.testing.assert_allclose(layer.running_mean, np.mean(means, 0), rtol=CLOSE_F64)
    np.testing.assert_allclose(layer.running_var, np.mean(variances, 0), rtol=CLOSE_F64)


def test_biased_running_variance(rng):
    layer = BatchNorm(3, momentum=1.0, unbiased=False, dtype=np.float64)
    x = images(rng, np.float64)
    layer(x)
    np.testing.assert_allclose(layer.running_var, x.var((0, 2, 3)), rtol=CLOSE_F64)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_empty_batch_counts_for_nothing(training):
    layer = BatchNorm(3).train(training)
    before = layer.state_dict()
    y = layer(np.empty((0, 3, 5, 5), np.float32))
    assert y.shape == (0, 3, 5, 5)
    np.testing.assert_equal(layer.state_dict(), before)
    assert layer.backward(y).shape == y.shape
    np.testing.assert_array_equal(layer.weight_grad, 0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_are_the_functional_ones(dtype, rng, axis, training):
    x, dy = images(rng, dtype), images(rng, dtype)
    channels = x.shape[axis]
    layer = BatchNorm(channels, axis=axis, dtype=dtype)
    layer.weight[...] = rng.normal(size=channels)
    layer(x)
    layer.backward(dy)
    layer.train(training)
    if training:
        _, mean, invstd = bnfast.batch_norm_forward(x, axis=axis)
    else:
        mean = layer.running_mean.copy()
        invstd = 1 / np.sqrt(layer.running_var.astype(np.float64) + layer.eps)
    layer(x)
    if not training:
        layer.running_mean += 100  # what backward needs was settled by the call
    dx = layer.backward(dy)
    expected = bnfast.batch_norm_backward(
        dy, x, mean, invstd, layer.weight, axis=axis, training=training
    )
    for got, want in zip((dx, layer.weight_grad, layer.bias_grad), expected, strict=True):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want)


def test_gradients_agree_with_the_reference(rng):
    x, dy = images(rng, np.float64), images(rng, np.float64)
    layer = BatchNorm(3, dtype=np.float64)
    layer.weight[...] = [1, -2, 0.5]
    layer(x)
    dx = layer.backward(dy)
    _, mean, invstd = reference.batch_norm_forward(x)
    expected = reference.batch_norm_backward(dy, x, mean, invstd, layer.weight)
    for got, want in zip((dx, layer.weight_grad, layer.bias_grad), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_each_backward_needs_its_own_call(rng):
    layer = BatchNorm(3)
    x = images(rng)
    with pytest.raises(RuntimeError, match=r"backward needs a call.*there has been none"):
        layer.backward(x)
    layer(x)
    with pytest.raises(ValueError, match="dy must have the shape"):
        layer.backward(x[:1])
    layer.backward(x)
    with pytest.raises(RuntimeError, match="the last one has had its backward"):
        layer.backward(x)
    y = x.copy()
    layer(y, out=y)
    with pytest.raises(RuntimeError, match="the last call wrote over its input"):
        layer.backward(x)


def test_only_a_mapping_is_a_state_dict():
    with pytest.raises(TypeError, match="state_dict must map names to arrays, got BatchNorm"):
        BatchNorm(3).load_state_dict(BatchNorm(3))


@pytest.mark.parametrize("data_dtype", [np.float32, np.float64])
def test_parameters_of_one_dtype_and_data_of_another(dtype, rng, data_dtype):
    layer = BatchNorm(3, dtype=dtype)
    x = images(rng, data_dtype)
    assert layer(x).dtype == data_dtype
    assert layer.backward(x).dtype == data_dtype
    assert layer.weight_grad.dtype == dtype
    assert layer.running_mean.dtype == dtype


def test_bad_input_leaves_the_layer_as_it_was(rng):
    layer = BatchNorm(3)
    layer(images(rng))
    before = layer.state_dict()
    for bad, error in (
        (images(rng, shape=(2, 4, 5, 5)), ValueError),
        (images(rng, shape=(1, 3)), ValueError),
        (images(rng).astype(np.int32), TypeError),
    ):
        with pytest.raises(error, match=r"^x must"):
            layer(bad)
        np.testing.assert_equal(layer.state_dict(), before)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"num_features": -1}, ValueError),
        ({"num_features": 2.5}, TypeError),
        ({"eps": -1e-5}, ValueError),
        ({"eps": "small"}, TypeError),
        ({"momentum": np.nan}, ValueError),
        ({"axis": 1.5}, TypeError),
        ({"dtype": np.float16}, TypeError),
        ({"dtype": "nonsense"}, TypeError),
    ],
    ids=str,
)
def test_bad_arguments_of_a_new_layer(bad, error):
    with pytest.raises(error, match=f"^{next(iter(bad))} must"):
        BatchNorm(**({"num_features": 3} | bad))


def test_eps_may_be_zero_in_evaluation_only(rng):
    layer = BatchNorm(3, eps=0.0)
    x = images(rng)
    np.testing.assert_array_equal(layer.eval()(x), x)
    with pytest.raises(ValueError, match="eps must be positive"):
        layer.train()(x)


@pytest.mark.parametrize("mode", ["training", "evaluation", "batch statistics"])
def test_out_of_the_call_and_of_backward(rng, mode):
    layer = BatchNorm(3, track_running_stats=mode != "batch statistics")
    layer.train(mode == "training")
    other = BatchNorm(3, track_running_stats=mode != "batch statistics").train(layer.training)
    x, dy = images(rng), images(rng)
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    np.testing.assert_array_equal(out, other(x))
    expected = other.backward(dy)
    assert layer.backward(dy, out=dy) is dy
    np.testing.assert_array_equal(dy, expected)


def test_in_place_leaves_nothing_to_go_back_from(rng):
    layer = BatchNorm(3)
    for _ in range(2):
        x = images(rng)
        layer(x, out=x)
        with pytest.raises(RuntimeError, match="not in place"):
            layer.backward(x)
        layer.eval()


def test_numpy_errors_come_before_anything_is_written(rng):
    x = images(rng)
    dy = np.full_like(x, 1e38)
    layer = BatchNorm(3)
    layer.running_var[...] = -1
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        assert np.isfinite(layer.running_mean).all()
        layer.backward(dy)
        layer.running_var[...] = -1
        assert np.isnan(layer.eval()(x)).all()
        layer.backward(dy)
        mean, invstd = np.zeros(3), np.ones(3)
        bnfast.batch_norm_backward(dy, x, mean, invstd, np.ones(3, np.float32), out=dy)


def test_a_state_of_the_layers_own_arrays_is_taken_as_it_was():
    layer = BatchNorm(3)
    layer.load_state_dict(layer.state_dict() | {"weight": layer.bias, "bias": layer.weight})
    np.testing.assert_array_equal(layer.weight, 0)
    np.testing.assert_array_equal(layer.bias, 1)


def test_an_array_without_channels_is_about_x():
    with pytest.raises(ValueError, match="x must have 3 channels"):
        BatchNorm(3)(np.empty(0, np.float32))


def test_parameters_may_change_before_backward(rng):
    layer, other = BatchNorm(3), BatchNorm(3)
    x, dy = images(rng), images(rng)
    layer(x), other(x)
    layer.weight *= 2
    np.testing.assert_array_equal(layer.backward(dy), other.backward(dy))


@pytest.mark.parametrize(
    "copy", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]
)
def test_copies_leave_the_input_out(rng, copy):
    layer = BatchNorm(3, axis=-1)
    x = images(rng, shape=(8, 5, 5, 3))
    layer(x)
    twin = copy(layer)
    assert len(pickle.dumps(layer)) < 2000
    np.testing.assert_equal(twin.state_dict(), layer.state_dict())
    with pytest.raises(RuntimeError, match="needs a call"):
        twin.backward(x)
    layer.backward(x)
    np.testing.assert_array_equal(twin.eval()(x), layer.eval()(x))


def test_a_warning_turned_error_leaves_the_layer_as_it_was(rng):
    layer = BatchNorm(3)
    before = layer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="values per channel"):
            layer(images(rng, shape=(7, 3)))
    np.testing.assert_equal(layer.state_dict(), before)


def test_a_small_batch_is_warned_about_once(rng):
    layer = BatchNorm(3)
    layer(images(rng, shape=(8, 3)))
    with pytest.warns(UserWarning, match="7 values per channel.*eval.*layer") as caught:
        layer(images(rng, shape=(7, 3)))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(images(rng, shape=(7, 3)))
        BatchNorm(3).eval()(images(rng, shape=(2, 3)))


def test_state_goes_into_a_layer_like_it(dtype, rng):
    layer = BatchNorm(3, dtype=dtype)
    layer.weight[...] = [1, 2, 3]
    for _ in range(3):
        layer(images(rng))
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert state["num_batches_tracked"].dtype == np.int64
    assert state["num_batches_tracked"].shape == ()
    other = BatchNorm(3, dtype=dtype)
    weight = other.weight
    other.load_state_dict(state)
    assert other.weight is weight
    np.testing.assert_equal(other.state_dict(), state)
    assert other.num_batches_tracked == 3
    state["weight"][...] = 0
    np.testing.assert_array_equal(other.weight, [1, 2, 3])
    np.testing.assert_array_equal(layer.weight, [1, 2, 3])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracking", [True, False])
def test_the_state_has_what_the_layer_has(affine, tracking):
    layer = BatchNorm(3, affine=affine, track_running_stats=tracking)
    names = ["weight", "bias"] * affine
    names += ["running_mean", "running_var", "num_batches_tracked"] * tracking
    assert list(layer.state_dict()) == names
    layer.load_state_dict(layer.state_dict())


def test_the_counter_may_be_missing_as_in_old_checkpoints(rng):
    layer = BatchNorm(3)
    layer(images(rng))
    state = layer.state_dict()
    del state["num_batches_tracked"]
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": None}, TypeError, "weight must"),
        ({"weight": np.ones(4)}, ValueError, "weight must"),
        ({"running_var": np.ones(3, int)}, TypeError, "running_var must"),
        ({"num_batches_tracked": -1}, ValueError, "num_batches_tracked must"),
        ({"num_batches_tracked": 1.5}, TypeError, "num_batches_tracked must"),
        ({"num_batches_tracked": np.uint64(2**63)}, ValueError, "num_batches_tracked must be at"),
        ({"gamma": np.ones(3)}, ValueError, r"unexpected \['gamma'\]"),
    ],
    ids=str,
)
def test_a_bad_state_changes_nothing(rng, change, error, message):
    layer = BatchNorm(3)
    layer(images(rng))
    before = layer.state_dict()
    with pytest.raises(error, match=message):
        layer.load_state_dict({name: array + 1 for name, array in before.items()} | change)
    np.testing.assert_equal(layer.state_dict(), before)
    with pytest.raises(ValueError, match=r"missing \['weight', 'bias'"):
        layer.load_state_dict({})


def test_a_state_of_half_precision_is_taken_exactly(dtype, rng):
    layer = BatchNorm(3, dtype=dtype)
    half = {
        name: rng.uniform(0.5, 2, 3).astype(np.float16)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    layer.load_state_dict(half)
    for name, array in layer.state_dict().items():
        if name in half:
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, half[name])


def test_reset_statistics_are_those_of_a_new_layer(rng):
    layer, new = BatchNorm(3), BatchNorm(3)
    layer(images(rng))
    layer.weight += 1
    tracked, running_mean = layer.state_dict(), layer.running_mean
    layer.reset_running_stats()
    assert layer.running_mean is running_mean
    np.testing.assert_equal(layer.state_dict(), new.state_dict() | {"weight": tracked["weight"]})
    plain = BatchNorm(3, track_running_stats=False)
    plain.reset_running_stats()
    assert plain.running_mean is None


def test_keras_weights_in_keras_order(dtype, rng):
    gamma, beta, mean = rng.normal(size=(3, 4)).astype(dtype)
    var = rng.uniform(1, 2, 4).astype(dtype)
    layer = BatchNorm.from_keras(gamma, beta, mean, var, momentum=0.9, epsilon=2e-3)
    assert (layer.axis, layer.eps, layer.unbiased, layer.dtype) == (-1, 2e-3, False, dtype)
    assert layer.momentum == pytest.approx(0.1)
    x = rng.normal(size=(6, 5, 4)).astype(dtype)
    expected = reference.scale_shift(x, mean, var, gamma, beta, 2e-3, axis=-1)
    np.testing.assert_allclose(layer.eval()(x), expected, rtol=CLOSE_F32, atol=CLOSE_F32)
    layer.train()(x)
    expected = reference.update_running(mean, var, x, 0.1, axis=-1, unbiased=False)
    np.testing.assert_allclose(layer.running_mean, expected[0], rtol=CLOSE_F32, atol=ROUNDED_F32)
    np.testing.assert_allclose(layer.running_var, expected[1], rtol=CLOSE_F32)
    assert not np.shares_memory(layer.running_mean, mean)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_keras_without_scale_or_center(rng, scale, center):
    gamma = np.full(4, 2, np.float32) if scale else None
    beta = np.full(4, 3, np.float32) if center else None
    layer = BatchNorm.from_keras(gamma, beta, np.zeros(4, np.float32), np.ones(4, np.float32))
    x = images(rng, shape=(8, 5, 4))
    expected = reference.batch_norm_forward(x, gamma, beta, 1e-3, axis=-1)[0]
    np.testing.assert_allclose(layer(x), expected, rtol=CLOSE_F32, atol=CLOSE_F32)
    layer.backward(x)
    assert (layer.weight_grad is None) == (not scale)
    assert (layer.bias_grad is None) == (not center)
    layer.load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("gamma", np.ones(3)),
        ("beta", np.ones(5)),
        ("moving_mean", np.ones((2, 2))),
        ("moving_variance", np.ones(4, int)),
        ("momentum", np.nan),
    ],
)
def test_bad_keras_weights(name, bad):
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        BatchNorm.from_keras(**({n: np.ones(4) for n in names} | {name: bad}))


@pytest.mark.parametrize("axis", [[3], (3,), np.int64(3)], ids=repr)
def test_the_axis_of_keras_may_be_in_a_list(axis):
    assert BatchNorm.from_keras(*np.ones((4, 2)), axis=axis).axis == 3


def test_weights_of_keras_that_are_too_few_say_which_are_none():
    with pytest.raises(TypeError, match="gamma is None of a layer with scale=False"):
        BatchNorm.from_keras(*np.ones((3, 2)))  # get_weights() of such a layer
    with pytest.raises(
        ValueError, match=r"axis must be one integer, or a list of one, got \[1, 2\]"
    ):
        BatchNorm.from_keras(*np.ones((4, 2)), axis=[1, 2])


def test_the_representation_says_how_to_make_it():
    assert repr(BatchNorm(3, axis=-1, momentum=None)) == (
        "BatchNorm(3, eps=1e-05, momentum=None, affine=True, track_running_stats=True, "
        "axis=-1, unbiased=True, dtype=float32)"
    )


def test_a_batch_of_another_dtype_leaves_the_layer_as_it_was():
    layer = bnfast.BatchNorm(3)
    with pytest.raises(TypeError, match="x must be float16, bfloat16, float32 or float64"):
        layer(np.zeros((2, 3), np.int64))
    with pytest.warns(UserWarning, match="mostly noise"):
        layer(np.zeros((2, 3), np.float32))
