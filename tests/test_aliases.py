"""No argument but x, w and dy may be the output, in whatever dtype it comes."""

import inspect

import numpy as np
import pytest

import bnfast
from public_calls import public_calls

ONES = np.ones(4)


def shared():
    """An output of 3 by 4, and a parameter of 4 float32 within it."""
    memory = np.ones((3, 4), np.float32)
    return memory, memory[1]


def strided():
    """The same with a parameter that is copied before it is used, because it is not contiguous."""
    memory = np.ones((8, 4), np.float32)
    return memory[:3], memory.ravel()[1:9:2]


X = np.arange(12, dtype=np.float32).reshape(3, 4)
MEAN, INVSTD, MATRIX = np.zeros(4), np.ones(4), np.eye(4)[None]
EACH = np.ones((3, 4))

CALLS = {
    "weight": lambda p, out: bnfast.batch_norm_forward(X, p, out=out),
    "bias": lambda p, out: bnfast.layer_norm(X, 4, None, p, out=out),
    "running_mean": lambda p, out: bnfast.batch_norm(X, p, ONES, out=out),
    "running_var": lambda p, out: bnfast.batch_norm(X, MEAN, p, training=True, out=out),
    "mean": lambda p, out: bnfast.batch_norm_backward(X, X, p, INVSTD, out=out),
    "invstd": lambda p, out: bnfast.batch_norm_backward(X, X, MEAN, p, out=out),
    "running_var ": lambda p, out: bnfast.batch_norm_forward(
        X, running_mean=MEAN.copy(), running_var=p, out=out
    ),
    "sum_dy": lambda p, out: bnfast.batch_norm_backward_input(
        X, X, MEAN, INVSTD, None, p, MEAN, 3, out=out
    ),
    "sum_dy_xhat": lambda p, out: bnfast.batch_norm_backward_input(
        X, X, MEAN, INVSTD, None, MEAN, p, 3, out=out
    ),
    "tau": lambda p, out: bnfast.filter_response_norm(X, tau=p, out=out),
    "learned_eps": lambda p, out: bnfast.filter_response_norm(X, learned_eps=p, out=out),
    "learned_eps ": lambda p, out: bnfast.filter_response_norm_backward(
        X, X, EACH, learned_eps=p, out=out
    ),
    "tau ": lambda p, out: bnfast.filter_response_norm_backward(X, X, EACH, tau=p, out=out),
    "weight ": lambda p, out: bnfast.ghost_batch_norm_forward(X[:2], 2, p, out=out[:2]),
    "running_mean ": lambda p, out: bnfast.decorrelated_batch_norm(X, p, MATRIX, out=out),
    "g": lambda p, out: bnfast.weight_norm(X.T.copy(), p, out=out.T),
    "gain": lambda p, out: bnfast.weight_standardization(X, p, axis=1, out=out),
    "gain ": lambda p, out: bnfast.scaled_weight_standardization_backward(
        X, X, MEAN, INVSTD, p, axis=1, out=out
    ),
    "mean ": lambda p, out: bnfast.weight_standardization_backward(
        X, X, p, INVSTD, axis=1, out=out
    ),
    "std": lambda p, out: bnfast.scaled_weight_standardization_backward(
        X, X, MEAN, p, axis=1, out=out
    ),
    "v": lambda p, out: bnfast.spectral_norm(X, np.ones(3), p, out=out),
    "v  ": lambda p, out: bnfast.spectral_norm_forward(X, np.ones(3), p, out=out),
    "v ": lambda p, out: bnfast.spectral_norm_backward(X, X, 1.0, np.ones(3), p, out=out),
}


@pytest.mark.parametrize("memory", [shared, strided])
@pytest.mark.parametrize("name", CALLS)
def test_a_parameter_within_the_output_is_refused_and_kept(name, memory):
    out, parameter = memory()
    with pytest.raises(ValueError, match=f"out must not share memory with {name.strip()}$"):
        CALLS[name](parameter, out)
    np.testing.assert_array_equal(out, np.ones_like(out))


def test_an_element_parameter_of_another_dtype_within_the_output_is_refused():
    memory = np.ones(12)
    out, weight = memory.view(np.float32)[:12].reshape(3, 4), memory[:4]
    with pytest.raises(ValueError, match="out must not share memory with weight"):
        bnfast.layer_norm(X, 4, weight, out=out)


# Of these it is all that they read.
OF_ONE_ARRAY = [n for n in bnfast.functional.__all__ if n.startswith("weight_centralization")]


@pytest.mark.parametrize("wrap", [np.asarray, memoryview], ids=["array", "memoryview"])
@pytest.mark.parametrize(
    "name",
    [
        n
        for n in bnfast.functional.__all__
        if "out" in inspect.signature(getattr(bnfast, n)).parameters and n not in OF_ONE_ARRAY
    ],
)
def test_no_other_argument_may_lie_in_the_output(monkeypatch, rng, name, wrap):
    function, tried = getattr(bnfast, name), []

    def called(*arguments, **keywords):
        bound = inspect.signature(function).bind(*arguments, **keywords)
        bound.apply_defaults()
        given = bound.arguments
        first = next(argument for argument in ("x", "w", "v") if argument in given)
        x = given[first]
        for argument, array in given.items():
            if argument in ("dy", "dw", "residual", first) or not isinstance(array, np.ndarray):
                continue
            out = np.zeros_like(x)
            within = out.reshape(-1).view(array.dtype)[: array.size].reshape(array.shape)
            within[...] = array
            bound.arguments = {**given, argument: wrap(within), "out": out}
            with pytest.raises((TypeError, ValueError), match=r"share memory|in place and must be"):
                function(*bound.args, **bound.kwargs)
            np.testing.assert_array_equal(within, array)
            tried.append(argument)
        return function(*arguments, **keywords)

    x, dy = rng.normal(size=(2, 8, 4, 4, 4)).astype(np.float32)
    calls = public_calls(x, dy, np.ones(4, np.float32), np.zeros(4, np.float32))
    monkeypatch.setattr(bnfast, name, called)
    calls[name]()
    assert tried
