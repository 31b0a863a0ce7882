"""Layers of weights: they do what the functions do, and own what belongs to them."""

import copy
import pickle

import numpy as np
import pytest

import bnfast
from bnfast import (
    ScaledWeightStandardization,
    SpectralNorm,
    WeightNorm,
    WeightStandardization,
    _primitives,
)
from oracle import central_differences
from tolerances import FINITE_DIFFERENCES

SHAPE = (4, 3, 2, 3)


# Layers whose raw weights are given at each call.
GIVEN = {
    "standardization": lambda w: WeightStandardization(4, dtype=w.dtype),
    "standardization, of the authors": lambda w: WeightStandardization(
        3, 1e-3, True, axis=-1, eps_inside=False, unbiased=True, dtype=w.dtype
    ),
    "scaled": lambda w: ScaledWeightStandardization(4, 1.7, dtype=w.dtype),
    "scaled, of timm": lambda w: ScaledWeightStandardization(
        3, 1.7, 1e-6, axis=1, floor=False, dtype=w.dtype
    ),
    "scaled, without gain": lambda w: ScaledWeightStandardization(4, gain=False, dtype=w.dtype),
    "spectral": SpectralNorm,
    "spectral, transposed": lambda w: SpectralNorm(w, 2, dim=1, v_first=True, rng=3),
}


# And all of them, as functions of their raw weights.
LAYERS = GIVEN | {
    "weight norm": WeightNorm,
    "weight norm, transposed": lambda w: WeightNorm(w, 1),
    "weight norm, of the whole": lambda w: WeightNorm(w, None),
    "weight norm, limited": lambda w: WeightNorm(w, eps=9.0),  # longer than one or two of SHAPE
}


@pytest.fixture(params=GIVEN)
def make_given(request):
    return GIVEN[request.param]


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


def weights(rng, dtype=np.float64):
    return rng.normal(1, 2, SHAPE).astype(dtype)


def parameters(layer):
    return [name for name in ("g", "v", "gain") if hasattr(layer, f"{name}_grad")]


def called(layer, w):
    """The weight that the layer gives, whether or not it owns the raw one."""
    return layer() if isinstance(layer, WeightNorm) else layer(w)


def randomized(layer, rng):
    """The layer, with parameters that are not those it begins with."""
    for name in parameters(layer):
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = rng.normal(size=np.shape(getattr(layer, name)))
    return layer


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("spectral")])
def test_layers_that_keep_nothing_compute_the_same_in_both_modes(name, rng):
    w, dy = weights(rng), weights(rng)
    layer = randomized(LAYERS[name](w), rng)
    results = [(called(mode(), w), layer.backward(dy)) for mode in (layer.train, layer.eval)]
    np.testing.assert_array_equal(*results)


def function_of(layer, w, dy):
    """What the functions give: the weight, its gradient and that of the gain or of g."""
    if isinstance(layer, WeightNorm):
        options = layer.g, layer.dim, layer.eps
        y, norm = bnfast.weight_norm_forward(layer.v, *options)
        return y, *bnfast.weight_norm_backward(dy, layer.v, layer.g, norm, *options[1:])
    if isinstance(layer, SpectralNorm):
        options = {"dim": layer.dim, "v_first": layer.v_first}
        y, sigma, u, v = bnfast.spectral_norm_forward(
            w, layer.u, layer.v, layer.n_power_iterations * layer.training, layer.eps, **options
        )
        dw = bnfast.spectral_norm_backward(dy, w, sigma, u, v, layer.eps, dim=layer.dim)
        return y, dw, None
    if isinstance(layer, WeightStandardization):
        name, given = "weight_standardization", (layer.gain, layer.eps)
        options = {"eps_inside": layer.eps_inside, "unbiased": layer.unbiased}
    else:
        name, given = "scaled_weight_standardization", (layer.gain, layer.gamma, layer.eps)
        options = {"floor": layer.floor}
    forward, backward = (getattr(bnfast, f"{name}_{pass_}") for pass_ in ("forward", "backward"))
    y, *saved = forward(w, *given, axis=layer.axis, **options)
    return y, *backward(dy, w, *saved, *given, axis=layer.axis, **options)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_layers_do_what_functions_do(make, dtype, rng, training):
    w, dy = weights(rng, dtype), weights(rng, dtype)
    layer = randomized(make(w), rng).train(training)
    y, dw, of_parameter = function_of(layer, w, dy)
    np.testing.assert_array_equal(called(layer, w), y)
    np.testing.assert_array_equal(layer.backward(dy), dw)
    for name in parameters(layer):
        gradient = getattr(layer, f"{name}_grad")
        if name == "v":
            np.testing.assert_array_equal(gradient, dw)
        elif getattr(layer, name) is None:
            assert gradient is None
        else:
            assert gradient.dtype == dtype
            np.testing.assert_array_equal(gradient, of_parameter)
    with pytest.raises(RuntimeError, match="the last one has had its backward"):
        layer.backward(dy)


def test_gradients_through_the_layer(make, rng):
    w, dy = weights(rng), weights(rng)
    layer = randomized(make(w), rng).eval()
    called(layer, w)
    dw = layer.backward(dy)
    gradients = {name: getattr(layer, f"{name}_grad") for name in parameters(layer)}
    arrays = {name: getattr(layer, name) for name in gradients}
    if not isinstance(layer, WeightNorm):
        gradients["raw"], arrays["raw"] = dw, w
    for name, gradient in gradients.items():
        if gradient is not None:
            numeric = central_differences(lambda: (called(layer, w) * dy).sum(), arrays[name])
            tolerance = FINITE_DIFFERENCES * max(1.0, np.abs(gradient).max())
            np.testing.assert_allclose(gradient, numeric, rtol=0, atol=tolerance, err_msg=name)


def test_parameters_as_they_were_at_the_call_make_the_gradient(make, rng):
    w, dy = weights(rng), weights(rng)
    layer, other = make(w), make(w)
    called(layer, w), called(other, w)
    for name in ("g", "gain"):
        if getattr(layer, name, None) is not None:
            getattr(layer, name)[...] *= 2
    np.testing.assert_array_equal(layer.backward(dy), other.backward(dy))


def test_backward_has_its_statistics_from_the_call(make_given, rng, monkeypatch):
    w, dy = weights(rng), weights(rng)
    layer, other = make_given(w), make_given(w)
    layer(w), other(w)
    expected = other.backward(dy)
    for name in ("moments", "normalize", "normalize_rows"):
        monkeypatch.delattr(_primitives, name)
    np.testing.assert_array_equal(layer.backward(dy), expected)


def test_outputs_may_have_a_place(make_given, dtype, rng):
    w, dy = weights(rng, dtype), weights(rng, dtype)
    layer = make_given(w).eval()
    y = layer(w)
    dw = layer.backward(dy)
    out = np.empty_like(w)
    assert layer(w, out=out) is out
    np.testing.assert_array_equal(out, y)
    assert layer.backward(dy, out=dy) is dy
    np.testing.assert_array_equal(dy, dw)
    assert layer(w, out=w) is w
    np.testing.assert_array_equal(w, y)
    with pytest.raises(RuntimeError, match="not in place"):
        layer.backward(dy)


def test_state_goes_from_layer_to_layer(make, dtype, rng):
    w = weights(rng, dtype)
    layer, other = randomized(make(w), rng), make(weights(rng, dtype))
    called(layer, w)
    other.load_state_dict(layer.state_dict())
    for copied in (other, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        np.testing.assert_equal(copied.state_dict(), layer.state_dict())
        np.testing.assert_array_equal(called(copied.eval(), w), called(layer.eval(), w))
        with pytest.raises(RuntimeError, match="needs a call"):
            copy.copy(copied).backward(w)


def test_the_state_has_pytorchs_names(rng):
    w = weights(rng)
    assert list(WeightNorm(w).state_dict()) == ["original0", "original1"]
    assert list(SpectralNorm(w).state_dict()) == ["_u", "_v"]
    assert list(ScaledWeightStandardization(4).state_dict()) == ["gain"]
    assert list(WeightStandardization(4).state_dict()) == []


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.ones(SHAPE, np.int64), TypeError, "w must be float32 or float64"),
        (np.ones((5, 5, 2, 5)), ValueError, r"w must have (\d filters|the shape)"),
        (np.ones(4), ValueError, "w must have"),
    ],
    ids=["dtype", "shape", "rank"],
)
def test_bad_weights_leave_the_layer_as_it_was(make_given, rng, bad, error, message):
    w = weights(rng)
    layer = make_given(w)
    layer(w)
    before = layer.state_dict()
    with pytest.raises(error, match=message):
        layer(bad)
    with pytest.raises(ValueError, match="out must have the shape"):
        layer(w, out=w[:1])
    np.testing.assert_equal(layer.state_dict(), before)
    with pytest.raises(ValueError, match="dy must have the shape"):
        layer.backward(w[:1])
    assert layer.backward(w).shape == w.shape


W = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("make_bad", "error", "message"),
    [
        (lambda: WeightNorm(W.astype(int)), TypeError, "weight must be float32 or float64"),
        (lambda: WeightNorm(W, -1), ValueError, "dim must not be negative"),
        (lambda: WeightNorm(W, 2), ValueError, "dim must be less than 2 for weight of shape"),
        (lambda: WeightNorm(W)(out=W[0]), ValueError, "out must have the shape and dtype"),
        (lambda: WeightNorm(W, eps=-1.0), ValueError, "eps must not be negative"),
        (lambda: WeightStandardization(-1), ValueError, "num_filters must be at least 0"),
        (lambda: WeightStandardization(2, -1.0), ValueError, "eps must not be negative"),
        (lambda: WeightStandardization(2, axis=2)(W), ValueError, "axis must be from -2 to 1"),
        (lambda: ScaledWeightStandardization(2, "2"), TypeError, "gamma must be a real number"),
        (lambda: ScaledWeightStandardization(2, dtype=int), TypeError, "dtype must be float32"),
        (lambda: SpectralNorm(W[0]), ValueError, "weight must have at least 2 dimensions"),
        (lambda: SpectralNorm(W, 0), ValueError, "n_power_iterations must be at least 1"),
        (lambda: SpectralNorm(W, eps=None), TypeError, "eps must be a real number"),
        (lambda: SpectralNorm(W, dim=2), ValueError, "dim must be from -2 to 1 for weight"),
    ],
)
def test_bad_arguments_are_refused(make_bad, error, message):
    with pytest.raises(error, match=message):
        make_bad()


def test_the_representation_says_how_to_make_it():
    assert repr(WeightNorm(W)) == "WeightNorm(float32 array of shape (2, 3), dim=0, eps=0.0)"
    assert repr(SpectralNorm(W)) == (
        "SpectralNorm(float32 array of shape (2, 3), n_power_iterations=1, eps=1e-12, dim=0, "
        "v_first=False)"
    )
    assert repr(WeightStandardization(2)) == (
        "WeightStandardization(2, eps=1e-05, gain=False, axis=0, eps_inside=True, unbiased=False, "
        "dtype=float32)"
    )
    assert repr(ScaledWeightStandardization(2)) == (
        "ScaledWeightStandardization(2, gamma=1.0, eps=0.0001, gain=True, axis=0, floor=True, "
        "dtype=float32)"
    )
