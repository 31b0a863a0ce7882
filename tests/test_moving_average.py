"""Moving average batch norm: values, both averages, gradients; centralized weights; the layer."""

import numpy as np
import pytest

import bnfast
from bnfast import MovingAverageBatchNorm
from bnfast import _reference_cross_batch as reference
from bnfast.functional import MovingAveraged
from cases import in_layout, misaligned
from oracle import WIDE, central_differences
from tolerances import CLOSE_F64, FINITE_DIFFERENCES, OUTPUT, eps_of

ROWS = 4


def inputs(rng, axis, dtype, shape=(6, 3, 5, 4), mean=1):
    x, dy = (in_layout(rng.normal(centre, 2, shape).astype(dtype), axis) for centre in (mean, 0))
    weight, bias = rng.normal(size=(2, shape[1])).astype(dtype)
    return x, dy, weight, bias


def statistics(rng, dtype, channels=3):
    """running_var, square_buffer and gradient_buffer."""
    var, *rows = rng.uniform(0.5, 9, (1 + 2 * ROWS, channels)).astype(dtype)
    return var, np.array(rows[:ROWS]), np.array(rows[ROWS:]) - dtype.type(4)


def close(got, expected, dtype, ulps=4 * OUTPUT):
    size = np.abs(expected).max() + 1
    np.testing.assert_allclose(
        got, expected.astype(np.float64), rtol=0, atol=float(ulps * eps_of(dtype) * size)
    )


@pytest.mark.parametrize("averaged", [True, False], ids=["averaged", "own"])
@pytest.mark.parametrize("r_max", [1.0, 1.2, 1e6])
@pytest.mark.parametrize("row", [0, 3])
def test_forward_and_backward_are_the_papers(isa, dtype, rng, axis, averaged, r_max, row):
    x, dy, weight, bias = inputs(rng, axis, dtype)
    var, squares, products = statistics(rng, dtype)
    options = {"row": row, "averaged": averaged, "axis": axis}
    y, invrms, r, after, buffer = reference.moving_average_batch_norm_forward(
        x, var, squares, weight, bias, 0.3, 1e-3, **options, r_max=r_max, precision=WIDE
    )
    dx, dweight, dbias, of_gradients = reference.moving_average_batch_norm_backward(
        dy, x, invrms, r, products, weight, **options, precision=WIDE
    )
    got, saved = bnfast.moving_average_batch_norm_forward(
        x, var, squares, weight, bias, 0.3, 1e-3, **options, r_max=r_max
    )
    for array, expected in (
        *((got, y), (saved.invrms, invrms), (saved.r, r)),
        *((var, after), (squares, buffer)),
    ):
        close(array, expected, dtype)
    assert (saved.row, saved.averaged) == (row, averaged)
    found = bnfast.moving_average_batch_norm_backward(dy, x, saved, products, weight, axis=axis)
    for array, expected in zip((*found, products), (dx, dweight, dbias, of_gradients), strict=True):
        close(array, expected, dtype, 16 * OUTPUT)
    assert got.dtype == found[0].dtype == found[1].dtype == dtype


def test_evaluation_divides_by_the_running_root_mean_square(dtype, rng, axis):
    x, _, weight, bias = inputs(rng, axis, dtype)
    var, squares, _ = statistics(rng, dtype)
    before = var.copy(), squares.copy()
    got = bnfast.moving_average_batch_norm(x, var, squares, weight, bias, axis=axis)
    expected = bnfast.batch_norm(x, np.zeros(3, dtype), var, weight, bias, axis=axis)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(
        bnfast.moving_average_batch_norm(x, var, None, weight, bias, axis=axis), expected
    )
    for array, as_it_was in zip((var, squares), before, strict=True):
        np.testing.assert_array_equal(array, as_it_was)


@pytest.mark.parametrize("averaged", [True, False], ids=["buffer of one", "own"])
def test_gradients_of_a_batch_alone_are_derivatives(rng, axis, averaged):
    """With r constant: the mean square of x is that of the buffer, and so is psi."""
    x, dy, weight, bias = inputs(rng, axis, np.float64, (3, 2, 2, 2))
    var = rng.uniform(0.5, 3, 2)
    _, saved = bnfast.moving_average_batch_norm_forward(
        x, var.copy(), np.zeros((1, 2)), weight, bias, r_max=3, averaged=averaged, axis=axis
    )
    assert (saved.r != 1).all()
    gradients = bnfast.moving_average_batch_norm_backward(
        dy, x, saved, np.zeros((1, 2)), weight, axis=axis
    )
    others = tuple(d for d in range(4) if d != axis % 4)

    def loss():
        chi = np.sqrt((x**2).mean(others, keepdims=True) + 1e-5)
        along = [np.expand_dims(values, others) for values in (weight * saved.r, bias)]
        return ((along[0] * x / chi + along[1]) * dy).sum()

    for array, gradient in zip((x, weight, bias), gradients, strict=True):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


def test_averages_of_equal_batches_are_derivatives_of_all_of_them(rng, axis):
    """The averages stand for a large batch: m times the same one makes what that makes."""
    x, dy, weight, bias = inputs(rng, axis, np.float64)
    squares, products = np.zeros((2, ROWS, 3))
    for row in range(ROWS):
        given = {"row": row, "r_max": 1, "axis": axis, "averaged": row == ROWS - 1}
        y, saved = bnfast.moving_average_batch_norm_forward(
            x, np.ones(3), squares, weight, bias, **given
        )
        dx, dweight, _ = bnfast.moving_average_batch_norm_backward(
            dy, x, saved, products, weight, axis=axis
        )
    many = [np.concatenate([array] * ROWS) for array in (x, dy)]
    expected, large = bnfast.moving_average_batch_norm_forward(
        many[0], np.ones(3), squares, weight, bias, averaged=False, r_max=1, axis=axis
    )
    of_many = bnfast.moving_average_batch_norm_backward(
        many[1], many[0], large, products, weight, axis=axis
    )
    np.testing.assert_allclose(y, expected[: len(x)], rtol=CLOSE_F64)
    np.testing.assert_allclose(dx, of_many[0][: len(x)], rtol=1e-10, atol=CLOSE_F64)
    np.testing.assert_allclose(ROWS * dweight, of_many[1], rtol=1e-12)


@pytest.mark.parametrize("tiny", [0.0, 1e-310, 1e-42, -1e-30])
def test_a_tiny_weight_has_the_gradient_of_the_other_batches(dtype, rng, axis, tiny):
    x, dy, _, _ = inputs(rng, axis, dtype)
    weight = np.array([tiny, 1, tiny])
    var, squares, products = statistics(rng, dtype)
    _, saved = bnfast.moving_average_batch_norm_forward(x, var, squares, weight, axis=axis)
    for out in (None, x.copy()):
        given = x if out is None else out
        dx, *_ = bnfast.moving_average_batch_norm_backward(
            dy, given, saved, products, weight, axis=axis, out=out
        )
        psi = products.astype(np.float64).mean(0)
        expected = -np.moveaxis(x, axis, -1) * saved.invrms**2 * psi
        channels = np.moveaxis(dx, axis, -1)[..., [0, 2]]
        np.testing.assert_allclose(channels, expected[..., [0, 2]], rtol=8 * eps_of(dtype))
    assert np.abs(expected[..., [0, 2]]).min() > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_channel(dtype, rng, axis, bad):
    x, dy, weight, bias = inputs(rng, axis, dtype)
    results = []
    for value in (x.flat[0], bad):
        x.flat[0] = value  # of channel 0
        state = statistics(np.random.default_rng(0), dtype)
        y, saved = bnfast.moving_average_batch_norm_forward(x, *state[:2], weight, bias, axis=axis)
        dx, *of_channels = bnfast.moving_average_batch_norm_backward(
            dy, x, saved, state[2], weight, axis=axis
        )
        results.append(
            [*[np.moveaxis(array, axis, -1) for array in (y, dx)], *of_channels, *state, *saved[:2]]
        )
    for good, other in zip(*results, strict=True):
        np.testing.assert_array_equal(good[..., 1:], other[..., 1:])


def test_awkward_memory_makes_the_same_bits(dtype, rng, axis):
    x, dy, weight, bias = inputs(rng, axis, dtype)
    rows = statistics(rng, dtype)
    results = []
    for change in (lambda a: a, misaligned, lambda a: np.repeat(a, 2, -1)[..., ::2]):
        var, squares, products = (change(a.copy()) for a in rows)
        given = [change(a) for a in (x, dy, weight, bias)]
        out, dx_out = (np.full_like(a, 7) for a in given[:2])
        y, saved = bnfast.moving_average_batch_norm_forward(
            given[0], var, squares, *given[2:], axis=axis, out=out
        )
        dx, *others = bnfast.moving_average_batch_norm_backward(
            given[1], given[0], saved, products, given[2], axis=axis, out=dx_out
        )
        assert y is out and dx is dx_out
        results.append([y, dx, *others, var, squares, products])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(6, 40, 30, 31), (3000, 40)], ids=str)
def test_bits_depend_on_neither_threads_nor_instruction_set(
    dtype, rng, use_isa, use_threads, axis, shape
):
    x, dy, weight, bias = inputs(rng, axis, dtype, shape, 30)
    rows, expected = statistics(rng, dtype, 40), None
    for isa in bnfast.available_isas():
        use_isa(isa)
        for num_threads in (1, 2, 5):
            use_threads(num_threads)
            var, squares, products = (array.copy() for array in rows)
            y, saved = bnfast.moving_average_batch_norm_forward(
                x, var, squares, weight, bias, axis=axis
            )
            gradients = bnfast.moving_average_batch_norm_backward(
                dy, x, saved, products, weight, axis=axis
            )
            got = [y, *gradients, *saved, var, squares, products]
            expected = expected or got
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_what_has_no_weight_leaves_nothing_in_the_running_average(dtype, rng, axis, momentum):
    x, *_ = inputs(rng, axis, dtype)
    var, squares = np.array([np.nan, np.inf, -0.0], dtype), np.ones((1, 3), dtype)
    before = var.tobytes()
    bnfast.moving_average_batch_norm_forward(
        x, var, squares, momentum=momentum, averaged=False, axis=axis
    )
    if momentum == 0.0:
        assert var.tobytes() == before
    else:
        np.testing.assert_array_equal(var, squares[0])


def test_a_mean_square_too_large_for_float32_is_warned_about():
    x, var, squares = np.full((2, 3), 1e30), np.ones(3), np.ones((1, 3), np.float32)
    with pytest.warns(RuntimeWarning, match="square_buffer is infinite from now on"):
        bnfast.moving_average_batch_norm_forward(x, var, squares, averaged=False)


def test_an_empty_batch_changes_nothing(dtype):
    state = [np.ones(3, dtype), np.ones((2, 3), dtype), np.ones((2, 3), dtype)]
    x = np.empty((0, 3, 5), dtype)
    y, saved = bnfast.moving_average_batch_norm_forward(x, *state[:2])
    dx, dweight, dbias = bnfast.moving_average_batch_norm_backward(x, x, saved, state[2])
    assert y.shape == dx.shape == x.shape
    for array in (dweight, dbias):
        np.testing.assert_array_equal(array, 0)
    for array in state:
        np.testing.assert_array_equal(array, 1)


X = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
SAVED = MovingAveraged(np.ones(3), np.ones(3), 0, True)


def trained(**changed):
    """A call of the forward pass with something wrong."""
    arguments = {"x": X, "running_var": np.ones(3), "square_buffer": np.ones((2, 3)), **changed}
    return bnfast.moving_average_batch_norm_forward(**arguments)


def shared():
    memory = np.ones((3, 3))
    return {"running_var": memory[0], "square_buffer": memory}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: trained(running_var=None),
            *(TypeError, "running_var is updated in place and must be a numpy array"),
        ),
        (
            lambda: trained(square_buffer=None),
            *(TypeError, "square_buffer is updated in place and must be a numpy array"),
        ),
        (
            lambda: trained(square_buffer=np.ones(3)),
            *(ValueError, "square_buffer must have rows of one value for each of the 3 channels"),
        ),
        (
            lambda: trained(square_buffer=np.ones((0, 3))),
            *(ValueError, "square_buffer must have rows .*, at least one row"),
        ),
        (
            lambda: trained(square_buffer=np.broadcast_to(np.ones(3), (2, 3))),
            *(ValueError, "square_buffer is updated in place and must be writable"),
        ),
        (
            lambda: trained(**shared()),
            *(ValueError, "square_buffer is updated in place and must not share memory with run"),
        ),
        (
            lambda: trained(x=X, running_var=X[0]),
            *(ValueError, "running_var is updated in place and must not share memory with x"),
        ),
        (lambda: trained(row=2), ValueError, "row must be less than 2"),
        (lambda: trained(row=-1), ValueError, "row must be at least 0"),
        (
            lambda: bnfast.moving_average_batch_norm(X, np.ones(3), row=0.5),
            *(TypeError, "row must be an integer"),
        ),
        (lambda: trained(r_max=0.5), ValueError, "r_max must be at least 1"),
        (lambda: trained(averaged=1), TypeError, "averaged must be True or False"),
        (lambda: trained(eps=0.0), ValueError, "eps must be positive in training"),
        (lambda: trained(bias=np.ones(2)), ValueError, "bias must have one value for each"),
        (lambda: trained(weight=np.ones(2)), ValueError, "weight must have one value for each"),
        (
            lambda: bnfast.moving_average_batch_norm_backward(X, X, (1, 2), np.ones((2, 3))),
            *(TypeError, "saved must be what moving_average_batch_norm_forward returned"),
        ),
        (
            lambda: bnfast.moving_average_batch_norm_backward(X, X, SAVED, np.ones((2, 2))),
            *(ValueError, "gradient_buffer must have rows of one value for each of the 3"),
        ),
        (
            lambda: bnfast.moving_average_batch_norm_backward(
                X, X, SAVED._replace(row=2), np.ones((2, 3))
            ),
            *(ValueError, "row must be less than 2"),
        ),
        (
            lambda: bnfast.moving_average_batch_norm_backward(
                X, X, SAVED._replace(r=np.ones(2)), np.ones((2, 3))
            ),
            *(ValueError, "r must have one value for each of the 3 channels"),
        ),
        (lambda: bnfast.moving_average_batch_norm(X, None), TypeError, "running_var must be an"),
        (
            lambda: bnfast.weight_centralization(np.ones(3)),
            *(ValueError, "w must have at least 2 dimensions, filters and what"),
        ),
        (
            lambda: bnfast.weight_centralization(X, out=np.ones((4, 3))),
            *(ValueError, "out must have the shape and dtype of w"),
        ),
        (
            lambda: bnfast.weight_centralization_backward(X, out=X[::-1]),
            *(ValueError, "out must be dy itself"),
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bad", [{"bias": np.ones(2)}, {"out": X[:2]}, {"row": 5}])
def test_a_refused_call_writes_nothing(bad):
    var, squares, out = np.ones(3), np.ones((2, 3)), np.full_like(X, 7)
    arguments = {"out": out, **bad}
    with pytest.raises(ValueError):
        trained(running_var=var, square_buffer=squares, **arguments)
    for array, value in ((var, 1), (squares, 1), (out, 7)):
        np.testing.assert_array_equal(array, value)
    products, wrong = np.ones((2, 3)), np.ones(2)
    with pytest.raises(ValueError, match="weight"):
        bnfast.moving_average_batch_norm_backward(X, X, SAVED, products, wrong, out=out)
    np.testing.assert_array_equal(products, 1)
    np.testing.assert_array_equal(out, 7)


@pytest.mark.parametrize("filters", [0, -1])
def test_centralized_weights_have_means_of_0(dtype, rng, filters):
    w, dy = rng.normal(3, 1, (2, 5, 4, 3)).astype(dtype)
    others = tuple(d for d in range(3) if d != filters % 3)
    y, mean = bnfast.weight_centralization_forward(w, filters)
    expected = w.astype(WIDE).mean(others, keepdims=True)
    close(mean, expected.squeeze(), dtype)
    close(y, w - expected, dtype)
    dw = bnfast.weight_centralization_backward(dy, filters)
    close(dw, dy - dy.astype(WIDE).mean(others, keepdims=True), dtype)
    close((y * dy).sum(), (w.astype(WIDE) * dw).sum(), dtype, 64)  # the gradient of a linear map
    assert bnfast.weight_centralization(w, filters, out=w) is w
    np.testing.assert_array_equal(w, y)


def test_a_large_mean_is_subtracted_from_weights_whole(dtype, rng):
    w = rng.normal(1e4, 1, (7, 301)).astype(dtype)
    exact = w - w.astype(WIDE).mean(1, keepdims=True)
    y = bnfast.weight_centralization(w)
    assert np.abs(y - exact).max() <= 4 * eps_of(dtype)


def test_the_layer_averages_once_it_is_warm(rng, axis):
    layer = MovingAverageBatchNorm(
        *(3, 2, 1e-3, 0.3), warm_up=3, renormalized_from=5, r_max=1.5, axis=axis, dtype=np.float64
    )
    layer.weight[...], layer.bias[...] = rng.normal(size=(2, 3))
    var, squares, products = np.ones(3), np.zeros((2, 3)), np.zeros((2, 3))
    for step in range(8):
        x, dy, *_ = inputs(rng, axis, np.float64)
        y, saved = bnfast.moving_average_batch_norm_forward(
            *(x, var, squares, layer.weight, layer.bias, 0.3, 1e-3),
            row=step % 2,
            averaged=step >= 3,
            r_max=1.5 if step >= 5 else 1.0,
            axis=axis,
        )
        dx, dweight, _ = bnfast.moving_average_batch_norm_backward(
            dy, x, saved, products, layer.weight, axis=axis
        )
        other = MovingAverageBatchNorm(
            *(3, 2, 1e-3, 0.3),
            **{"warm_up": 3, "renormalized_from": 5, "r_max": 1.5, "axis": axis},
            dtype=np.float64,
        )
        other.load_state_dict(layer.state_dict())
        for one in (other, layer):
            np.testing.assert_array_equal(one(x), y)
            np.testing.assert_array_equal(one.backward(dy), dx)
            np.testing.assert_array_equal(one.weight_grad, dweight)
            np.testing.assert_array_equal(one.running_var, var)
            np.testing.assert_array_equal(one.square_buffer, squares)
            np.testing.assert_array_equal(one.gradient_buffer, products)
            assert one.num_batches_tracked == step + 1
    assert list(layer.state_dict()) == [
        *("weight", "bias", "running_var", "square_buffer", "gradient_buffer"),
        "num_batches_tracked",
    ]


def test_the_buffer_is_full_before_it_is_averaged(rng):
    layer = MovingAverageBatchNorm(3, 4, warm_up=0, renormalized_from=10**6)
    for step in range(6):
        x = rng.normal(size=(5, 3)).astype(np.float32)
        own, _ = bnfast.moving_average_batch_norm_forward(
            x, np.ones(3), np.ones((1, 3)), averaged=False, r_max=1
        )
        assert np.array_equal(layer(x), own) == (step < 4)


def test_averages_make_small_batches_like_large_ones(rng):
    """What the normalization is for: batches of two, of a distribution that stays the same."""
    layer = MovingAverageBatchNorm(3, 50, warm_up=0, renormalized_from=10**6)
    outputs = []
    for _ in range(100):
        x = rng.normal(0, (1, 2, 3), (2, 3)).astype(np.float32)
        y = layer(x)
        dx = layer.backward(y)
        outputs.append((y / x, np.abs(dx).max()))
    spread = np.std([ratio for ratio, _ in outputs[50:]], (0, 1))
    before = np.std([ratio for ratio, _ in outputs[:50]], (0, 1))
    assert (spread < before / 4).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"buffer_size": 0}, ValueError, "buffer_size must be at least 1"),
        ({"momentum": None}, TypeError, "momentum must be a real number"),
        ({"warm_up": -1}, ValueError, "warm_up must be at least 0"),
        ({"renormalized_from": 1.5}, TypeError, "renormalized_from must be an integer"),
        ({"r_max": 0.0}, ValueError, "r_max must be at least 1"),
    ],
)
def test_a_layer_of_bad_arguments_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        MovingAverageBatchNorm(3, **arguments)
