"""Bad input: one clear error, and nothing written."""

import tracemalloc

import numpy as np
import pytest

import bnfast
from bnfast import _validation

C = 3
X = np.arange(2 * C * 4, dtype=np.float32).reshape(2, C, 4) / 7


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def ones(n=C, dtype=np.float32):
    return np.ones(n, dtype)


def overlapping():
    return np.lib.stride_tricks.as_strided(np.zeros(40, np.float32), X.shape, (16, 8, 4))


BAD_ARRAYS = [
    (np.zeros((2, C, 4), np.int64), TypeError, "float32 or float64.*int64.*2, 3, 4"),
    (np.zeros((2, C, 4), np.bool_), TypeError, "float32 or float64.*bool"),
    (np.zeros((2, C, 4), np.complex64), TypeError, "float32 or float64.*complex64"),
    (np.zeros((2, C, 4), ">f2"), TypeError, "float32 or float64.*>f2"),
    (np.zeros((2, C, 4), object), TypeError, "float32 or float64.*object"),
    (np.zeros((2, C, 4), X.dtype.newbyteorder()), TypeError, "native byte order.*>f4"),
    ([[1, 2], [3, 4]], TypeError, "float32 or float64.*int64"),
    ([[1.0], [2.0, 3.0]], TypeError, "an array.*list"),
    ("text", TypeError, "float32 or float64"),
    (None, TypeError, "float32 or float64 array, got None"),
    (np.ma.masked_array(X, X > 1), TypeError, "without a mask"),
    (np.float32(3), ValueError, r"at least 2 dimensions.*\(\)"),
    (np.zeros((), np.float32), ValueError, r"at least 2 dimensions.*\(\)"),
    (np.zeros(5, np.float32), ValueError, r"at least 2 dimensions.*\(5,\)"),
]

BAD_PARAMETERS = [
    (ones(4), ValueError, r"3 channels.*\(4,\)"),
    (ones(2), ValueError, r"3 channels.*\(2,\)"),
    (np.ones((1, C), np.float32), ValueError, r"\(1, 3\)"),
    (np.float32(1), ValueError, r"\(\)"),
    (1.0, ValueError, r"\(\)"),
    (ones(dtype=np.int32), TypeError, "float32 or float64.*int32"),
    (ones(dtype=">f2"), TypeError, "float32 or float64.*>f2"),
    (ones(dtype=np.complex128), TypeError, "float32 or float64.*complex128"),
]

BAD_RUNNING = [
    *[case for case in BAD_PARAMETERS if isinstance(case[0], np.ndarray)],
    (read_only(ones()), ValueError, "writable.*read-only"),
    ([1.0, 1.0, 1.0], TypeError, "updated in place.*numpy array.*list"),
    (np.broadcast_to(np.float32(1), C), ValueError, "writable"),
]

BAD_OUT = [
    (np.zeros((2, C, 5), np.float32), ValueError, r"shape and dtype of x.*\(2, 3, 5\)"),
    (np.zeros((2, C, 4), np.float64), ValueError, "shape and dtype of x.*float64"),
    (read_only(X), ValueError, "writable.*read-only"),
    ([[0.0]], TypeError, "numpy array.*list"),
    (np.ma.masked_array(X.copy(), X > 1), TypeError, "mask"),
    (overlapping(), ValueError, "overlap itself"),
]

BAD_EPS = [
    (-1e-5, ValueError, "eps.*negative|eps.*positive"),
    (np.nan, ValueError, "eps.*finite"),
    (np.inf, ValueError, "eps.*finite"),
    (10**400, ValueError, "eps.*finite"),
    ("1e-5", TypeError, "eps.*real number.*str"),
    (None, TypeError, "eps.*real number.*NoneType"),
    (1j, TypeError, "eps.*real number.*complex"),
    (np.complex64(1), TypeError, "eps.*real number.*complex64"),
    (np.array([1e-5]), TypeError, "eps.*real number.*float64 array of shape"),
    (True, TypeError, "eps.*real number.*bool"),
]

BAD_AXES = [
    (3, ValueError, r"axis.*from -3 to 2.*\(2, 3, 4\).*3"),
    (-4, ValueError, "axis.*-4"),
    (2**70, ValueError, "axis.*1180591620717411303424"),
    (-(2**63) - 1, ValueError, "axis.*-9223372036854775809"),
    (1.0, TypeError, "axis.*integer.*float"),
    (True, TypeError, "axis.*integer.*bool"),
    (None, TypeError, "axis.*integer.*NoneType"),
    ((1, 2), TypeError, "axis.*integer.*tuple"),
]


def raises(function, error, message, name, *arguments, **keywords):
    """The error names the argument, and every array that came in is as it was."""
    arrays = [a for a in (*arguments, *keywords.values()) if type(a) is np.ndarray]
    kept = [a.copy() for a in arrays]
    with pytest.raises(error, match=message) as caught:
        function(*arguments, **keywords)
    assert str(caught.value).startswith(name)
    for array, copy in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def train(x=X, mean=None, var=None, weight=None, bias=None, **keywords):
    return bnfast.batch_norm(x, mean, var, weight, bias, training=True, **keywords)


def infer(x=X, mean=None, var=None, weight=None, bias=None, **keywords):
    return bnfast.batch_norm(x, mean, var, weight, bias, **keywords)


@pytest.mark.parametrize(("bad", "error", "message"), BAD_ARRAYS)
def test_the_input(bad, error, message):
    out = np.zeros_like(X)
    raises(train, error, message, "x ", bad, ones(), ones(), out=out)
    raises(infer, error, message, "x ", bad, ones(), ones(), out=out)
    raises(bnfast.batch_norm_forward, error, message, "x ", bad, out=out)
    raises(bnfast.batch_norm_backward, error, message, "x ", X, bad, ones(), ones(), out=out)


@pytest.mark.parametrize(("bad", "error", "message"), BAD_AXES)
def test_the_axis(bad, error, message):
    raises(train, error, message, "axis ", X, ones(), ones(), axis=bad)
    raises(infer, error, message, "axis ", X, ones(), ones(), axis=bad)
    raises(bnfast.batch_norm_backward, error, message, "axis ", X, X, ones(), ones(), axis=bad)


@pytest.mark.parametrize(("bad", "error", "message"), BAD_PARAMETERS)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weight_and_bias(bad, error, message, name):
    out = np.zeros_like(X)
    raises(train, error, message, f"{name} ", X, ones(), ones(), out=out, **{name: bad})
    raises(infer, error, message, f"{name} ", X, ones(), ones(), out=out, **{name: bad})
    raises(bnfast.batch_norm_forward, error, message, f"{name} ", X, out=out, **{name: bad})


@pytest.mark.parametrize(("bad", "error", "message"), BAD_PARAMETERS)
@pytest.mark.parametrize("name", ["mean", "invstd", "weight"])
def test_parameters_of_backward(bad, error, message, name):
    good = {"mean": ones(), "invstd": ones(), "weight": None}
    raises(bnfast.batch_norm_backward, error, message, f"{name} ", X, X, **(good | {name: bad}))


@pytest.mark.parametrize(("bad", "error", "message"), BAD_PARAMETERS)
@pytest.mark.parametrize("name", ["mean", "invstd", "weight", "sum_dy", "sum_dy_xhat"])
def test_parameters_of_the_halves_of_backward(bad, error, message, name):
    good = {"mean": ones(), "invstd": ones()}
    if name in good:
        raises(
            *(bnfast.batch_norm_backward_sums, error, message, f"{name} ", X, X),
            **(good | {name: bad}),
        )
    good |= {"weight": None, "sum_dy": ones(), "sum_dy_xhat": ones(), "count": 3}
    out = np.zeros_like(X)
    raises(
        *(bnfast.batch_norm_backward_input, error, message, f"{name} ", X, X),
        **(good | {name: bad, "out": out}),
    )


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (0, ValueError, "positive"),
        (-3, ValueError, "positive"),
        (np.nan, ValueError, "finite"),
        (np.inf, ValueError, "finite"),
        (10**400, ValueError, "finite"),
        (None, TypeError, "a real number"),
        (True, TypeError, "a real number"),
        (np.full(C, 3), TypeError, "a real number"),
    ],
)
def test_the_count_of_the_sums(bad, error, message):
    given = ones(), ones(), None, ones(), ones(), bad
    raises(bnfast.batch_norm_backward_input, error, message, "count ", X, X, *given)


@pytest.mark.parametrize("name", ["sum_dy", "sum_dy_xhat"])
def test_the_input_half_needs_the_sums(name):
    good = {"weight": None, "sum_dy": ones(), "sum_dy_xhat": ones(), "count": 3}
    raises(
        *(bnfast.batch_norm_backward_input, TypeError, "None", f"{name} ", X, X, ones(), ones()),
        **(good | {name: None}),
    )


@pytest.mark.parametrize("name", ["mean", "invstd"])
def test_backward_needs_the_statistics(name):
    good = {"mean": ones(), "invstd": ones()}
    raises(bnfast.batch_norm_backward, TypeError, "None", f"{name} ", X, X, **(good | {name: None}))


@pytest.mark.parametrize(("bad", "error", "message"), BAD_RUNNING)
def test_running_statistics_in_training(bad, error, message):
    out = np.zeros_like(X)
    raises(train, error, message, "running_mean ", X, bad, ones(), out=out)
    raises(train, error, message, "running_var ", X, ones(), bad, out=out)
    forward, good = bnfast.batch_norm_forward, {"running_mean": ones(), "running_var": ones()}
    for name in good:
        raises(forward, error, message, f"{name} ", X, out=out, **(good | {name: bad}))


def test_running_statistics_that_lie_in_the_input():
    x = X.copy()
    raises(train, ValueError, "share memory with x", "running_mean ", x, x[0, :, 0], ones())
    raises(train, ValueError, "share memory with x", "running_var ", x, ones(), x[0, :, 0])


def test_one_running_statistic_without_the_other():
    raises(train, ValueError, "None for running_var", "running_mean and", X, ones(), None)
    raises(train, ValueError, "None for running_mean", "running_mean and", X, None, ones())


def test_running_statistics_that_share_memory():
    both = ones()
    raises(train, ValueError, "share memory", "running_mean and", X, both, both)
    long = ones(C + 1)
    raises(train, ValueError, "share memory", "running_mean and", X, long[1:], long[:-1])
    one = np.lib.stride_tricks.as_strided(ones(1), (C,), (0,))
    raises(train, ValueError, "a place for each", "running_mean and", X, one, ones())


@pytest.mark.parametrize(("bad", "error", "message"), BAD_PARAMETERS)
def test_running_statistics_in_evaluation(bad, error, message):
    out = np.zeros_like(X)
    raises(infer, error, message, "running_mean ", X, bad, ones(), out=out)
    raises(infer, error, message, "running_var ", X, ones(), bad, out=out)


def test_evaluation_needs_running_statistics():
    raises(infer, TypeError, "None", "running_mean ", X)
    raises(infer, TypeError, "None", "running_mean ", X, None, ones())
    raises(infer, TypeError, "None", "running_var ", X, ones(), None)


def test_read_only_running_statistics_will_do_in_evaluation():
    np.testing.assert_array_equal(
        infer(X, read_only(ones()), read_only(ones())), infer(X, ones(), ones())
    )


@pytest.mark.parametrize(("bad", "error", "message"), BAD_OUT)
def test_out(bad, error, message):
    raises(train, error, message, "out ", X, ones(), ones(), out=bad)
    raises(infer, error, message, "out ", X, ones(), ones(), out=bad)
    raises(bnfast.batch_norm_forward, error, message, "out ", X, out=bad)
    raises(bnfast.batch_norm_backward, error, message, "out ", X, X, ones(), ones(), out=bad)


@pytest.mark.parametrize("shift", [np.s_[1:], np.s_[:0:-1]], ids=["shifted", "reversed"])
def test_out_that_overlaps_an_input_in_part(shift):
    memory = np.arange(3 * C * 4, dtype=np.float32).reshape(3, C, 4)
    x, out = memory[:-1], memory[shift]
    raises(train, ValueError, "x itself or share no element", "out ", x, out=out)
    raises(infer, ValueError, "x itself or share no element", "out ", x, ones(), ones(), out=out)
    other = np.ones_like(x)
    raises(
        *(bnfast.batch_norm_backward, ValueError, "x itself or share no element", "out "),
        *(other, x, ones(), ones()),
        out=out,
    )
    raises(
        *(bnfast.batch_norm_backward, ValueError, "dy itself or share no element", "out "),
        *(x, other, ones(), ones()),
        out=out,
    )


def test_out_that_may_overlap_is_refused_where_nobody_can_tell(monkeypatch):
    def too_hard(*_, **__):
        raise np.exceptions.TooHardError

    memory = np.zeros((2, C, 8), np.float32)
    monkeypatch.setattr(np, "shares_memory", too_hard)
    raises(
        train,
        ValueError,
        "x itself or share no element",
        "out ",
        memory[..., ::2],
        out=memory[..., 1::2],
    )


def test_in_place_where_an_axis_of_length_one_has_another_stride():
    a = np.arange(12, dtype=np.float32).reshape(4, C)
    x, out = a[:, :, None], a.reshape(4, C, 1)
    assert x.strides != out.strides
    expected = train(x.copy())
    np.testing.assert_array_equal(train(x, out=out), expected)


def test_out_that_interleaves_with_the_input_is_fine():
    memory = np.zeros((2, C, 8), np.float32)
    x, out = memory[..., ::2], memory[..., 1::2]
    x[...] = X
    np.testing.assert_array_equal(train(x, out=out), train(X))
    np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize("name", ["mean", "var", "weight", "bias"])
def test_out_must_not_hold_a_parameter(name):
    out = np.zeros((2, C, 4), np.float32)
    given = {"mean": ones(), "var": ones(), "weight": ones(), "bias": ones(), name: out[0, 0, :C]}
    full = {"mean": "running_mean", "var": "running_var"}.get(name, name)
    raises(train, ValueError, f"share memory with {full}", "out ", X, out=out, **given)
    raises(infer, ValueError, f"share memory with {full}", "out ", X, out=out, **given)


@pytest.mark.parametrize("name", ["mean", "invstd", "weight"])
def test_out_of_backward_must_not_hold_a_parameter(name):
    out = np.zeros((2, C, 4), np.float32)
    given = {"mean": ones(), "invstd": ones(), "weight": ones(), name: out[0, 0, :C]}
    raises(
        bnfast.batch_norm_backward,
        *(ValueError, f"share memory with {name}", "out "),
        *(X, X),
        out=out,
        **given,
    )


@pytest.mark.parametrize(("bad", "error", "message"), BAD_EPS)
def test_eps(bad, error, message):
    raises(train, error, message, "eps ", X, ones(), ones(), eps=bad)
    raises(infer, error, message, "eps ", X, ones(), ones(), eps=bad)
    raises(bnfast.batch_norm_forward, error, message, "eps ", X, eps=bad)


def test_eps_may_be_zero_in_evaluation_only():
    raises(train, ValueError, "eps.*positive.*0.0", "eps ", X, ones(), ones(), eps=0.0)
    np.testing.assert_array_equal(infer(X, 0 * ones(), ones(), eps=0), X)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (np.nan, ValueError),
        (np.inf, ValueError),
        (-np.inf, ValueError),
        (None, TypeError),
        ("0.1", TypeError),
        ([0.1, 0.2], TypeError),
    ],
)
def test_momentum(bad, error):
    raises(train, error, "momentum must be", "momentum ", X, ones(), ones(), momentum=bad)
    raises(infer, error, "momentum must be", "momentum ", X, ones(), ones(), momentum=bad)
    raises(bnfast.batch_norm_forward, error, "momentum must be", "momentum ", X, momentum=bad)


@pytest.mark.parametrize("bad", [0.1, 1, None, "False", np.ones(2)], ids=repr)
def test_training_is_true_or_false(bad):
    mean = ones()
    with pytest.raises(TypeError, match="training must be True or False"):
        bnfast.batch_norm(X, mean, ones(), None, None, bad)
    with pytest.raises(TypeError, match="training must be True or False"):
        bnfast.batch_norm_backward(X, X, ones(), ones(), training=bad)
    np.testing.assert_array_equal(mean, ones())


@pytest.mark.parametrize("training", [True, False, np.True_, np.False_], ids=repr)
def test_numpy_has_booleans_too(training):
    expected = bnfast.batch_norm(X, ones(), ones(), training=bool(training))
    np.testing.assert_array_equal(
        bnfast.batch_norm(X, ones(), ones(), None, None, training), expected
    )


@pytest.mark.parametrize("number", [1, np.float32(0.5), np.int64(1), np.array(0.5)])
def test_any_real_number_will_do(number):
    train(X, ones(), ones(), momentum=number, eps=number)


@pytest.mark.parametrize("shape", [(1, C), (1, C, 1), (1, C, 1, 1), (1, 0), (1, 0, 1)])
def test_one_value_per_channel_has_no_unbiased_variance(shape):
    x, one = np.ones(shape, np.float32), ones(shape[1])
    message = "x must have more than one value per channel for an unbiased variance, got shape "
    raises(train, ValueError, message, "", x, one, one.copy())
    assert infer(x, one, one).shape == shape


@pytest.mark.parametrize("shape", [(1, C), (1, C, 1)])
def test_one_value_per_channel_has_moments(shape):
    x = np.ones(shape, np.float32)
    assert bnfast.moments(x).count == 1


@pytest.mark.parametrize(
    "dy",
    [np.ones((2, C, 5), np.float32), np.ones((2, C, 4), np.float64), np.ones((2, C), np.float32)],
)
def test_dy_of_another_shape_or_dtype(dy):
    raises(
        bnfast.batch_norm_backward, ValueError, "shape and dtype of x", "dy ", dy, X, ones(), ones()
    )


def test_messages_stay_short():
    with pytest.raises(TypeError) as caught:
        bnfast.batch_norm_forward([[10**6] * 1000] * 1000)
    assert len(str(caught.value)) < 300


def test_messages_tell_the_whole_story():
    with pytest.raises(ValueError) as caught:
        bnfast.batch_norm(X, ones(9), ones(9))
    assert str(caught.value) == (
        "running_mean must have one value for each of the 3 channels, shape (3,), "
        "got float32 array of shape (9,)"
    )


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (0, ValueError, "at least 1, got 0"),
        (-1, ValueError, "at least 1, got -1"),
        (1.5, TypeError, "an integer.*float"),
        ("2", TypeError, "an integer.*str"),
        (True, TypeError, "an integer.*bool"),
    ],
)
def test_set_num_threads(bad, error, message):
    raises(bnfast.set_num_threads, error, message, "num_threads must be", bad)


def test_show_config_mode():
    with pytest.raises(ValueError, match="mode must be 'stdout' or 'dicts', got 'text'"):
        bnfast.show_config(mode="text")


def test_one_of_some_words():
    raises(
        *(bnfast.decorrelated_batch_norm, ValueError, "'whitening' or 'covariance', got 'mean'"),
        *("averaged must be", X),
        averaged="mean",
    )


def test_matrices_of_groups():
    matrix = np.zeros((1, 2, 2))
    raises(
        *(bnfast.decorrelated_batch_norm_backward, ValueError, r"3 channels.*\(1, 2, 2\)"),
        *("matrix must have a square matrix", X, X, bnfast.Whitened(np.zeros(3), matrix)),
    )
    raises(
        *(bnfast.Whitened.of_covariance, ValueError, r"each group of channels.*\(2, 2\)"),
        *("covariance must have a square matrix", np.zeros(2), matrix[0]),
    )


def test_running_matrices():
    raises(
        *(train_whitened, ValueError, r"the shape \(1, 3, 3\).*\(3, 3\)", "running_matrix must"),
        *(ones(), np.eye(3)),
    )
    raises(
        *(train_whitened, ValueError, "read-only", "running_matrix is updated in place"),
        *(ones(), read_only(np.eye(3)[None])),
    )


def train_whitened(mean, matrix):
    return bnfast.decorrelated_batch_norm(X, mean, matrix, training=True)


def test_what_the_forward_pass_returned():
    raises(
        *(bnfast.iterative_norm_backward, TypeError, "what iterative_norm_forward returned"),
        *("saved must be", X, X, (ones(), ones())),
    )


@pytest.mark.parametrize("size", [2**60, 2**62, 10**30])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("num_features", bnfast.BatchNorm),
        ("num_features", bnfast.InstanceNorm),
        ("num_features", bnfast.FilterResponseNorm),
        ("num_features", bnfast.BatchRenorm),
        ("num_features", bnfast.MovingAverageBatchNorm),
        ("buffer_size", lambda size: bnfast.MovingAverageBatchNorm(3, size)),
        ("filter_shape", lambda size: bnfast.CrossIterationBatchNorm((3, size))),
        ("window", lambda size: bnfast.CrossIterationBatchNorm((3, 2), size)),
        ("num_features", lambda size: bnfast.IterNorm(size, 1)),
        ("num_channels", lambda size: bnfast.GroupNorm(1, size)),
        ("num_filters", bnfast.WeightStandardization),
        ("num_classes", lambda size: bnfast.ConditionalBatchNorm(3, size)),
        ("normalized_shape", bnfast.LayerNorm),
        ("normalized_shape", lambda size: bnfast.RMSNorm((size, 2))),
    ],
)
def test_sizes_that_no_array_has_are_named(name, make, size):
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        make(size)


def test_shapes_that_no_array_has_are_named_before_any_is_made():
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^num_classes by num_features must be "):
            bnfast.ConditionalBatchNorm(2**30, 2**31)
        with pytest.raises(ValueError, match=r"^normalized_shape must be "):
            bnfast.LayerNorm((1,) * 65)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["ghost_batch_norm", "decorrelated_batch_norm", "iterative_norm"])
def test_as_many_axes_as_there_can_be_are_named_where_one_more_is_needed(name):
    x = np.zeros((4, 2, *[1] * (_validation.MOST_AXES - 2)), np.float32)
    more = (2,) if name == "ghost_batch_norm" else ()
    forward = getattr(bnfast, f"{name}_forward")
    with pytest.raises(ValueError, match=r"^x must have at most "):
        forward(x, *more)
    y, *_ = forward(x[..., 0, 0], *more)
    assert y.shape == x.shape[:-2]
    bnfast.batch_norm_forward(x)


def test_messages_say_what_is_likely_meant():
    with pytest.raises(
        ValueError, match=r"along axis 1, got shape .*; of channels last it is axis=-1$"
    ):
        bnfast.BatchNorm(3)(np.zeros((4, 5, 5, 3), np.float32))
    for x in (np.zeros((4, 3), np.uint8), [[1, 2], [3, 4]]):
        with pytest.raises(TypeError, match=r"; numpy.asarray\(x, numpy.float32\) is such$"):
            bnfast.batch_norm_forward(x)
    with pytest.raises(TypeError, match=r"got complex128 array of shape \(4, 3\)$"):
        bnfast.batch_norm_forward(np.zeros((4, 3), complex))
