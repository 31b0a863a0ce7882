"""PyTorch as a second oracle, where it is installed: its samples, its modules, its gradients."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

import bnfast
from bnfast._arrays import as_array
from tolerances import CLOSE_F32, PEER_GRADIENT, PEER_OUTPUT, PEER_PARAMETER_GRADIENT, ROUNDED_F32

torch = pytest.importorskip("torch")
functional = torch.nn.functional


def to_numpy(value):
    return value.detach().numpy().copy() if torch.is_tensor(value) else value


def opinfo(name):
    """PyTorch's description of an operation, with samples: it ships with the package."""
    pytest.importorskip("expecttest")  # imported by PyTorch's own test package
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = [op for op in op_db if op.name == f"nn.functional.{name}" and not op.variant_test_name]
    return op


def opinfo_samples(name):
    """All samples of an operation, those for references too, each with its dtype."""
    op = opinfo(name)
    return [
        (str(dtype), sample)
        for dtype in (torch.float32, torch.float64)
        for sample in [*op.sample_inputs("cpu", dtype), *op.reference_inputs("cpu", dtype)]
    ]


@pytest.mark.parametrize(
    ("name", "fewest"),
    [
        *(("batch_norm", 48), ("group_norm", 108), ("instance_norm", 36), ("layer_norm", 24)),
        ("rms_norm", 24),
    ],
)
def test_all_samples_of_pytorch(name, fewest):
    samples = opinfo_samples(name)
    assert len(samples) >= fewest
    for dtype, sample in samples:
        # Input, arguments and keywords; running statistics are updated, so each side has its own.
        theirs = [a.clone() if torch.is_tensor(a) else a for a in (sample.input, *sample.args)]
        ours = [to_numpy(a) for a in theirs]
        their_keywords = {
            k: a.clone() if torch.is_tensor(a) else a for k, a in sample.kwargs.items()
        }
        keywords = {k: to_numpy(a) for k, a in their_keywords.items()}
        expected = getattr(functional, name)(*theirs, **their_keywords)
        got = getattr(bnfast, name)(*ours, **keywords)
        pairs = zip(
            [got, *ours, *keywords.values()],
            [expected, *theirs, *their_keywords.values()],
            strict=True,
        )
        for a, b in pairs:
            if torch.is_tensor(b):
                message = f"{dtype} {tuple(sample.input.shape)} {sample.args} {sample.kwargs}"
                torch.testing.assert_close(
                    torch.from_numpy(a), b.detach(), equal_nan=True, msg=message
                )


def terms_of_channels(name, x, *arguments, **keywords):
    """The sizes of scale * x, scale * mean and bias, which PyTorch adds up, together.

    It folds batch and instance norm into a scale and a shift, and rounds statistics and both.
    """
    given = inspect.signature(getattr(functional, name)).bind(x, *arguments, **keywords).arguments
    wide = {k: v.double().numpy() if torch.is_tensor(v) else v for k, v in given.items()}
    x, dims = wide["input"], tuple(range(2, x.ndim))
    if name == "batch_norm":
        own, dims = wide.get("training", False), (0, *dims)
    else:
        own = wide.get("use_input_stats", True)

    def spread(key, default):
        value = wide.get(key)
        return default if value is None else value.reshape(-1, *[1] * (x.ndim - 2))

    mean, var = spread("running_mean", 0.0), spread("running_var", 1.0)
    if own and x.size:
        mean, var = x.mean(dims, keepdims=True), x.var(dims, keepdims=True)
    scale = np.abs(spread("weight", 1.0)) / np.sqrt(var + wide.get("eps", 1e-5))
    return scale * (np.abs(x) + np.abs(mean)) + np.abs(spread("bias", 0.0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "fewest"),
    [
        *(("batch_norm", 24), ("group_norm", 54), ("instance_norm", 18), ("layer_norm", 12)),
        ("rms_norm", 12),
    ],
)
def test_all_samples_of_pytorch_in_16_bits(name, fewest, dtype):
    finfo = pytest.importorskip("ml_dtypes").finfo(dtype)
    op, half = opinfo(name), getattr(torch, dtype)
    samples = [*op.sample_inputs("cpu", half), *op.reference_inputs("cpu", half)]
    assert len(samples) >= fewest
    for sample in samples:
        given = (sample.input, *sample.args)
        theirs = [a.clone() if torch.is_tensor(a) else a for a in given]
        ours = [as_array(a).copy() if torch.is_tensor(a) else a for a in theirs]
        their_keywords = {
            k: a.clone() if torch.is_tensor(a) else a for k, a in sample.kwargs.items()
        }
        keywords = {
            k: as_array(a).copy() if torch.is_tensor(a) else a for k, a in their_keywords.items()
        }
        expected = getattr(functional, name)(*theirs, **their_keywords)
        got = getattr(bnfast, name)(*ours, **keywords)
        of_terms = 0.0
        if name in ("batch_norm", "instance_norm"):
            of_terms = float(finfo.eps) * terms_of_channels(name, *given, **sample.kwargs)
        pairs = [(got, expected, of_terms)]
        pairs += [(a, b, 0.0) for a, b in zip(ours, theirs, strict=True)]
        pairs += [(keywords[k], their_keywords[k], 0.0) for k in keywords]
        for a, b, more in pairs:
            if torch.is_tensor(b):
                b = as_array(b)
                assert a.dtype == b.dtype
                # Each side rounds once, and not to the same side of a value in the middle.
                step = np.spacing(np.maximum(np.abs(a), np.abs(b))).astype(np.float64)
                error = np.abs(a.astype(np.float64) - b.astype(np.float64))
                assert (error <= step + more).all(), (sample, a, b)


@pytest.mark.parametrize("name", ["group_norm", "rms_norm"])  # the others list none
def test_what_pytorch_refuses_is_refused(name):
    for bad in opinfo(name).error_inputs("cpu"):
        sample = bad.sample_input
        keywords = {k: to_numpy(a) for k, a in sample.kwargs.items()}
        with pytest.raises((TypeError, ValueError)):
            getattr(bnfast, name)(*[to_numpy(a) for a in (sample.input, *sample.args)], **keywords)


def test_errors_come_where_pytorch_raises():
    x, ones = torch.ones(4, 3, 5), torch.ones(3)
    for arguments, keywords in (
        ((x, ones, ones), {"training": True, "eps": 0.0}),
        ((x, ones, ones), {"training": False, "eps": -1.0}),
        ((x, None, None), {"training": False}),
        ((x, ones, None), {"training": True}),
        ((x, None, ones), {"training": False}),
        ((x[:1, :, :1], ones, ones), {"training": True}),
        ((x, torch.ones(4), ones), {"training": True}),
        ((x, ones, ones, torch.ones(2)), {"training": True}),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            functional.batch_norm(*arguments, **keywords)
        with pytest.raises((ValueError, TypeError)):
            bnfast.batch_norm(*[to_numpy(a) for a in arguments], **keywords)


def test_infinity_makes_the_same_running_statistics():
    x = np.random.default_rng(0).normal(size=(4, 3, 5))
    x[0, 0, 0] = np.inf
    mean, var = np.zeros(3), np.ones(3)
    y = bnfast.batch_norm(x, mean, var, training=True)
    tensors = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    expected = functional.batch_norm(torch.from_numpy(x), *tensors, training=True)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-12)
    np.testing.assert_allclose(mean, tensors[0].numpy(), rtol=1e-12)
    np.testing.assert_allclose(var, tensors[1].numpy(), rtol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 4, 5, 6)], ids=str)
def test_gradients_are_autograds(isa, rng, shape, training):
    x, dy = rng.normal(2, 3, (2, *shape))
    weight, bias, mean = rng.normal(size=(3, 3))
    var = rng.uniform(0.5, 2, 3)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, weight, bias)]
    y = functional.batch_norm(
        *(tensors[0], torch.from_numpy(mean.copy()), torch.from_numpy(var.copy())),
        *(tensors[1], tensors[2], training),
    )
    y.backward(torch.from_numpy(dy))
    if training:
        _, mean, invstd = bnfast.batch_norm_forward(x)
    else:
        invstd = 1 / np.sqrt(var + 1e-5)
    got = bnfast.batch_norm_backward(dy, x, mean, invstd, weight, training=training)
    for a, tensor in zip(got, tensors, strict=True):
        np.testing.assert_allclose(a, tensor.grad.numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["group_norm", "instance_norm", "layer_norm", "rms_norm"])
def test_gradients_of_the_family_are_autograds(isa, rng, name):
    x, dy = rng.normal(2, 3, (2, 4, 6, 5, 3))
    of_rows = name in ("layer_norm", "rms_norm")
    weight, bias = rng.normal(size=(2, *((5, 3) if of_rows else (6,))))
    bias = None if name == "rms_norm" else bias
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, weight, bias) if a is not None]
    theirs, *parameters = tensors
    if name == "instance_norm":
        y = functional.instance_norm(theirs, weight=parameters[0], bias=parameters[1])
        saved = bnfast.instance_norm_forward(x)[1:]
    elif name == "group_norm":
        y = functional.group_norm(theirs, 3, *parameters)
        saved = bnfast.group_norm_forward(x, 3)[1:]
    else:
        y = getattr(functional, name)(theirs, (5, 3), *parameters)
        saved = (5, 3), *getattr(bnfast, f"{name}_forward")(x, (5, 3))[1:]
    y.backward(torch.from_numpy(dy))
    got = getattr(bnfast, f"{name}_backward")(dy, x, *saved, weight)
    for a, tensor in zip(got, tensors, strict=True):
        np.testing.assert_allclose(a, tensor.grad.numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_checkpoints_are_taken_exactly(half):
    theirs = torch.nn.BatchNorm1d(3)
    torch.nn.init.uniform_(theirs.weight)
    theirs = theirs.to(getattr(torch, half))
    ours = bnfast.BatchNorm(3)
    ours.load_state_dict(theirs.state_dict())
    np.testing.assert_array_equal(ours.weight, theirs.weight.detach().float().numpy())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (bnfast.InstanceNorm(6), torch.nn.InstanceNorm2d(6)),
        (
            bnfast.InstanceNorm(6, 1e-3, 0.3, True, True),
            torch.nn.InstanceNorm2d(6, 1e-3, 0.3, True, True),
        ),
        (
            bnfast.InstanceNorm(6, 1e-3, None, False, True),
            torch.nn.InstanceNorm2d(6, 1e-3, None, False, True),
        ),
        (bnfast.GroupNorm(3, 6), torch.nn.GroupNorm(3, 6)),
        (bnfast.GroupNorm(2, 6, 1e-3, False), torch.nn.GroupNorm(2, 6, 1e-3, False)),
        (bnfast.LayerNorm((5, 3)), torch.nn.LayerNorm((5, 3))),
        (bnfast.LayerNorm(3, 1e-3, True, False), torch.nn.LayerNorm(3, 1e-3, True, False)),
        (bnfast.LayerNorm(3, 1e-3, False), torch.nn.LayerNorm(3, 1e-3, False)),
        (bnfast.RMSNorm((5, 3)), torch.nn.RMSNorm((5, 3))),
        (bnfast.RMSNorm(3, 1e-3, False), torch.nn.RMSNorm(3, 1e-3, False)),
    ],
    ids=repr,
)
def test_layers_of_the_family_go_the_way_of_modules(rng, ours, theirs):
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    ours.load_state_dict(theirs.state_dict())
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        x, dy = rng.normal(2, 3, (2, 4, 6, 5, 3)).astype(np.float32)
        tensor = torch.from_numpy(x).requires_grad_()
        theirs.zero_grad()
        expected = theirs(tensor)
        expected.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(ours(x), expected.detach().numpy(), **PEER_OUTPUT)
        np.testing.assert_allclose(ours.backward(dy), tensor.grad.numpy(), **PEER_GRADIENT)
        gradients = {"weight": ours.weight_grad, "bias": ours.bias_grad}
        for name, parameter in theirs.named_parameters():
            np.testing.assert_allclose(
                gradients[name], parameter.grad.numpy(), **PEER_PARAMETER_GRADIENT
            )
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, array in ours.state_dict().items():
        np.testing.assert_allclose(array, state[name].numpy(), rtol=CLOSE_F32, atol=ROUNDED_F32)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_pytorchs(rng, dim):
    module = torch.nn.Conv2d(4, 6, 3).double()
    torch.nn.utils.parametrizations.weight_norm(module, dim=dim)
    g, v = module.parametrizations.weight.original0, module.parametrizations.weight.original1
    dw = rng.normal(size=tuple(v.shape))
    module.weight.backward(torch.from_numpy(dw))
    lengths = to_numpy(g)
    w, norm = bnfast.weight_norm_forward(to_numpy(v), lengths, dim)
    np.testing.assert_allclose(w, to_numpy(module.weight), rtol=1e-12)
    dv, dg = bnfast.weight_norm_backward(dw, to_numpy(v), lengths, norm, dim)
    np.testing.assert_allclose(dg, g.grad.numpy(), rtol=1e-10)
    np.testing.assert_allclose(dv, v.grad.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1])
def test_spectral_norm_is_pytorchs(rng, dim):
    module = torch.nn.Conv2d(4, 6, 3).double()
    torch.nn.utils.parametrizations.spectral_norm(module, n_power_iterations=2, dim=dim)
    (parametrization,) = module.parametrizations.weight
    w = module.parametrizations.weight.original
    u, v = (to_numpy(getattr(parametrization, name)) for name in ("_u", "_v"))
    dw = rng.normal(size=tuple(w.shape))
    expected = module.weight
    expected.backward(torch.from_numpy(dw))
    y, sigma, u, v = bnfast.spectral_norm_forward(to_numpy(w), u, v, 2, dim=dim)
    np.testing.assert_allclose(y, to_numpy(expected), rtol=1e-12)
    gradient = bnfast.spectral_norm_backward(dw, to_numpy(w), sigma, u, v, dim=dim)
    np.testing.assert_allclose(gradient, w.grad.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(u, to_numpy(parametrization._u), rtol=1e-10)
    np.testing.assert_allclose(v, to_numpy(parametrization._v), rtol=1e-10)


@pytest.mark.parametrize(("kind", "dim"), [("Conv2d", 0), ("ConvTranspose2d", 1), ("Conv2d", None)])
def test_the_weight_norm_layer_takes_a_parametrized_state(rng, kind, dim):
    module = getattr(torch.nn, kind)(4, 6, 3)
    torch.nn.utils.parametrizations.weight_norm(module, dim=dim)
    with torch.no_grad():
        for parameter in module.parametrizations.weight.parameters():
            parameter.copy_(torch.from_numpy(np.asarray(rng.normal(size=parameter.shape))))
    layer = bnfast.WeightNorm(rng.normal(size=tuple(module.weight.shape)).astype(np.float32), dim)
    layer.load_state_dict(module.state_dict(), prefix="parametrizations.weight.")
    np.testing.assert_allclose(layer(), to_numpy(module.weight), **PEER_OUTPUT)
    dw = rng.normal(size=layer.v.shape).astype(np.float32)
    module.weight.backward(torch.from_numpy(dw))
    layer.backward(dw)
    g, v = module.parametrizations.weight.parameters()
    np.testing.assert_allclose(layer.g_grad, g.grad.numpy(), **PEER_PARAMETER_GRADIENT)
    np.testing.assert_allclose(layer.v_grad, v.grad.numpy(), **PEER_GRADIENT)
    back = {
        f"parametrizations.weight.{n}": torch.as_tensor(a) for n, a in layer.state_dict().items()
    }
    module.load_state_dict(back | {"bias": module.bias.detach()})


@pytest.mark.parametrize(("kind", "dim"), [("Conv2d", 0), ("ConvTranspose2d", 1), ("Linear", 0)])
def test_the_spectral_norm_layer_takes_a_parametrized_state(rng, kind, dim):
    module = getattr(torch.nn, kind)(*((4, 6, 3) if dim or kind == "Conv2d" else (4, 6)))
    torch.nn.utils.parametrizations.spectral_norm(module, n_power_iterations=2)
    original = module.parametrizations.weight.original
    layer = bnfast.SpectralNorm(to_numpy(original), 2, dim=dim, rng=7)
    layer.load_state_dict(module.state_dict(), prefix="parametrizations.weight.0.")
    for training in (True, True, False):
        module.train(training)
        layer.train(training)
        with torch.no_grad():
            original.copy_(torch.from_numpy(rng.normal(size=tuple(original.shape))))
        module.zero_grad()
        expected = module.weight
        np.testing.assert_allclose(layer(to_numpy(original)), to_numpy(expected), **PEER_OUTPUT)
        dw = rng.normal(size=layer.shape).astype(np.float32)
        expected.backward(torch.from_numpy(dw))
        np.testing.assert_allclose(layer.backward(dw), original.grad.numpy(), **PEER_GRADIENT)
    (parametrization,) = module.parametrizations.weight
    for name, array in layer.state_dict().items():
        np.testing.assert_allclose(array, to_numpy(getattr(parametrization, name)), **PEER_OUTPUT)


@pytest.mark.parametrize("momentum", [0.1, None, 0.7])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracking", [True, False])
def test_the_layer_goes_the_way_of_the_module(rng, momentum, affine, tracking):
    module = torch.nn.BatchNorm2d(3, 1e-3, momentum, affine, tracking)
    layer = bnfast.BatchNorm(3, 1e-3, momentum, affine, tracking)
    if affine:
        with torch.no_grad():
            module.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
            module.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    layer.load_state_dict(module.state_dict())
    for step in range(6):
        x = rng.normal(2, 3, (4, 3, 5, 6)).astype(np.float32)
        dy = rng.normal(size=x.shape).astype(np.float32)
        layer.train(step % 3 < 2)
        module.train(step % 3 < 2)
        module.zero_grad()
        tensor = torch.from_numpy(x).requires_grad_()
        expected = module(tensor)
        expected.backward(torch.from_numpy(dy))
        torch.testing.assert_close(torch.from_numpy(layer(x)), expected.detach())
        torch.testing.assert_close(torch.from_numpy(layer.backward(dy)), tensor.grad)
        if affine:
            torch.testing.assert_close(torch.from_numpy(layer.weight_grad), module.weight.grad)
            torch.testing.assert_close(torch.from_numpy(layer.bias_grad), module.bias.grad)
    ours = {name: torch.from_numpy(array) for name, array in layer.state_dict().items()}
    assert list(ours) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert ours[name].dtype == tensor.dtype
        torch.testing.assert_close(ours[name], tensor)
    torch.nn.BatchNorm2d(3, 1e-3, momentum, affine, tracking).load_state_dict(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_state_goes_to_pytorch_and_back(rng, dtype):
    layer = bnfast.BatchNorm(5, dtype=str(dtype).removeprefix("torch."))
    layer(rng.normal(size=(8, 5, 2)))
    module = torch.nn.BatchNorm1d(5, dtype=dtype)
    module.load_state_dict({k: torch.from_numpy(v) for k, v in layer.state_dict().items()})
    back = bnfast.BatchNorm(5, dtype=layer.dtype)
    back.load_state_dict(module.state_dict())
    np.testing.assert_equal(back.state_dict(), layer.state_dict())


BESIDE = """
import numpy as np, torch, bnfast
from bnfast import _threads
_threads.allowed_threads = lambda: 64
x = np.random.default_rng(0).normal(3, 2, (8, 16, 64, 64)).astype(np.float32)
bnfast.set_num_threads(1)
expected = bnfast.batch_norm_forward(x)
bnfast.set_num_threads(3)
torch.set_num_threads(2)
tensor = torch.from_numpy(x)
total = tensor.add(1).sum()
for _ in range(20):
    for a, b in zip(bnfast.batch_norm_forward(x), expected):
        np.testing.assert_array_equal(a, b)
    assert tensor.add(1).sum() == total
"""


def test_both_openmp_runtimes_work_in_turn():
    done = subprocess.run(
        [sys.executable, "-c", BESIDE], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
