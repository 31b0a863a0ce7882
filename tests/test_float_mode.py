"""Denormals are kept, whatever the float mode of the caller or of OpenMP's threads; it stays."""

import inspect
import pickle
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bnfast
from bnfast import _core, functional
from public_calls import arrays_of, public_calls
from test_same_bits import assert_same

# What control registers may be found to say: MXCSR, and FPCR. In the trapping one a denormal result
# ends the process.
MODES = {
    "x86_64": {"flushing": 0x9FC0, "downward": 0x3F80, "trapping": 0x1680},
    "aarch64": {"flushing": 1 << 24, "downward": 2 << 22, "trapping": 1 << 11},
}.get(platform.machine().replace("arm64", "aarch64").replace("AMD64", "x86_64"), {})

needs_modes = pytest.mark.skipif(not MODES, reason="the float mode of this machine is not known")

SHAPE = (4, 32, 6, 7)
DENORMAL = 1e-40  # in float32


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def called_in(mode, function):
    """What a function returns or raises in another float mode, which it must leave as it was."""
    before = _core.float_mode()
    _core.assume_float_mode(mode)
    written = _core.float_mode()
    try:
        return function()
    finally:
        found = _core.float_mode()
        _core.assume_float_mode(before)
        assert found == written != before


def denormal(values):
    return values * np.finfo(values.dtype).tiny / 16


def small_numbers(rng, dtype):
    """Arguments that are denormal, or of which results or what lies between are."""
    x, dy = rng.normal(size=(2, *SHAPE)).astype(dtype)
    weight, bias = rng.normal(size=(2, SHAPE[1])).astype(dtype)
    root = np.sqrt(np.finfo(dtype).tiny)
    return {
        "small inputs": (denormal(x), denormal(dy), weight, bias),
        "small squares": (x * root, dy * root, weight, bias * root),
        "small parameters": (x, dy, denormal(weight), denormal(bias)),
        "small gradients": (x, denormal(dy), weight, bias),
    }


@needs_modes
@pytest.mark.parametrize(("name", "num_threads"), [*[(name, 1) for name in MODES], ("flushing", 2)])
def test_functions_do_not_depend_on_the_mode_of_the_caller(
    isa, dtype, rng, use_threads, name, num_threads
):
    use_threads(num_threads)
    for what, arguments in small_numbers(rng, dtype).items():
        for called, call in public_calls(*arguments).items():
            expected = arrays_of(call())
            for a, b in zip(arrays_of(called_in(MODES[name], call)), expected, strict=True):
                np.testing.assert_array_equal(a, b, f"{called}, {what}")


LEARNED = bnfast.LearnableMomentum(0.25, per_channel=True)
AVERAGED = bnfast.ExponentialAverage(new=1e-320, bias_corrected=True)
LAYERS = {
    "batch": lambda x: bnfast.BatchNorm(32, dtype=x.dtype),
    "batch, learned": lambda x: bnfast.BatchNorm(32, momentum=LEARNED, dtype=x.dtype),
    "batch, averaged": lambda x: bnfast.BatchNorm(32, momentum=AVERAGED, dtype=x.dtype),
    "conditional, learned": lambda x: bnfast.ConditionalBatchNorm(
        32, 3, momentum=LEARNED, dtype=x.dtype
    ),
    "ghosts, learned": lambda x: bnfast.GhostBatchNorm(32, 2, momentum=LEARNED, dtype=x.dtype),
    "conditional": lambda x: bnfast.ConditionalBatchNorm(32, 3, dtype=x.dtype),
    "decorrelated": lambda x: bnfast.DecorrelatedBatchNorm(32, num_groups=4, dtype=x.dtype),
    "iterative": lambda x: bnfast.IterNorm(32, num_groups=4, dtype=x.dtype),
    "response": lambda x: bnfast.FilterResponseNorm(32, learned_eps=DENORMAL, dtype=x.dtype),
    "ghosts": lambda x: bnfast.GhostBatchNorm(32, 2, dtype=x.dtype),
    "renormalized": lambda x: bnfast.BatchRenorm(32, dtype=x.dtype),
    "averaged": lambda x: bnfast.MovingAverageBatchNorm(32, 1, warm_up=0, dtype=x.dtype),
    "cross iteration": lambda x: bnfast.CrossIterationBatchNorm((32, 3, 1, 1), dtype=x.dtype),
    "group": lambda x: bnfast.GroupNorm(4, 32, dtype=x.dtype),
    "instance": lambda x: bnfast.InstanceNorm(32, 1e-5, 0.1, True, True, dtype=x.dtype),
    "layer": lambda x: bnfast.LayerNorm(7, dtype=x.dtype),
    "rms": lambda x: bnfast.RMSNorm(7, dtype=x.dtype),
    "weight": bnfast.WeightNorm,
    "standardized": lambda x: bnfast.WeightStandardization(4, dtype=x.dtype),
    "scaled": lambda x: bnfast.ScaledWeightStandardization(4, dtype=x.dtype),
    "spectral": bnfast.SpectralNorm,
}


def used(make, x, dy, parameters):
    """All numbers of a layer that takes its parameters, is trained and evaluates."""
    layer = make(x)
    state = layer.state_dict()
    layer.load_state_dict(
        {
            name: a if name not in parameters else np.resize(parameters[name], a.shape)
            for name, a in state.items()
        }
    )
    given = () if isinstance(layer, bnfast.WeightNorm) else (x,)
    if isinstance(layer, bnfast.ConditionalBatchNorm):
        given = (x, [0, 1, 2, 0])
    if isinstance(layer, bnfast.CrossIterationBatchNorm):
        given = (x, x[:, :3], np.ones(layer.filter_shape, x.dtype))
    results = [layer(*given), layer.backward(dy), layer.eval()(*given), layer.backward(dy)]
    gradients = [value for name, value in vars(layer).items() if name.endswith("_grad")]
    return [*results, *arrays_of(gradients), *layer.state_dict().values()]


@needs_modes
@pytest.mark.parametrize("name", LAYERS)
def test_layers_do_not_depend_on_the_mode_of_the_caller(dtype, rng, mode, name):
    for x, dy, weight, bias in small_numbers(rng, dtype).values():
        # Float64 parameters are rounded to the layer's dtype.
        wide = weight.astype(np.float64), bias.astype(np.float64)
        arguments = LAYERS[name], x, dy, dict(zip(("weight", "bias"), wide, strict=True))
        assert_same(called_in(mode, lambda a=arguments: used(*a)), used(*arguments))


def entries(thing):
    """What users call of a class, by name."""
    for name, value in vars(thing).items():
        value = getattr(value, "__func__", getattr(value, "fget", value))
        called = inspect.isfunction(value) or isinstance(value, _core.GuardedFunction)
        if called and (name == "__call__" or not name.startswith("_")):
            yield name, value


MOVE_NUMBERS_ONLY = {
    *("train", "eval", "release", "state_dict"),
    *("count", "mean", "m2", "minimum", "maximum", "nonfinite", "to_bytes", "save", "load"),
}


def test_whatever_users_call_is_guarded():
    functions = {
        name: getattr(module, name)
        for module in (functional, bnfast.folding)
        for name in module.__all__
    }
    classes = {c for thing in vars(bnfast).values() if inspect.isclass(thing) for c in thing.mro()}
    methods = {
        f"{c.__name__}.{name}": value
        for c in classes
        if c.__module__.startswith("bnfast.")
        for name, value in entries(c)
        if name not in MOVE_NUMBERS_ONLY and not getattr(value, "__isabstractmethod__", False)
    }
    assert {"BatchNorm.from_keras", "Moments.std", "SpectralNorm.__call__"} <= set(methods)
    unguarded = {
        name
        for name, value in (functions | methods).items()
        if not inspect.isclass(value) and not isinstance(value, _core.GuardedFunction)
    }
    assert unguarded == set()


def test_the_calls_are_of_all_functions(rng):
    calls = public_calls(*small_numbers(rng, np.float32)["small gradients"])
    functions = {name for name in functional.__all__ if name[0].islower()}
    assert set(calls) == functions


@needs_modes
def test_the_mode_stays_where_a_call_raises(mode):
    for call in (
        lambda: bnfast.batch_norm_forward(np.ones((2, 3)), eps=-1.0),
        lambda: bnfast.batch_norm(1, 2, 3, 4, 5, no_such_argument=6),
        lambda: bnfast.BatchNorm(3)(np.ones((2, 4))),
        lambda: bnfast.moments(np.ones((2, 3))).merge(None),
    ):
        with pytest.raises((TypeError, ValueError)):
            called_in(mode, call)


WORKERS = """
import ctypes, os, sys, threading
import numpy as np, bnfast
from bnfast import _core, _threads
sys.path.insert(0, {tests!r})
from public_calls import arrays_of, public_calls
from test_float_mode import small_numbers
_threads.allowed_threads, _threads.SERIAL_BYTES, _threads.BYTES_PER_THREAD = lambda: 2, 0, 1
runtime = ctypes.CDLL(_core.build_facts()["openmp_library"])
kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

def of_workers(do):
    found, caller = {{}}, threading.get_ident()
    def body(_):
        if threading.get_ident() != caller:
            found[threading.get_ident()] = do()
    runtime.GOMP_parallel(kind(body), None, 2, 0)
    return found

calls = [
    call
    for dtype in (np.float32, np.float64)
    for arguments in small_numbers(np.random.default_rng(0), np.dtype(dtype)).values()
    for call in public_calls(*arguments).values()
]
bnfast.set_num_threads(1)
expected = [arrays_of(call()) for call in calls]
of_workers(lambda: _core.assume_float_mode({mode}))
before = of_workers(_core.float_mode)
assert set(before.values()) == {{{mode}}}, before
bnfast.set_num_threads(2)
for call, arrays in zip(calls, expected):
    for a, b in zip(arrays_of(call()), arrays, strict=True):
        np.testing.assert_array_equal(a, b)
assert of_workers(_core.float_mode) == before
"""


@needs_modes
@pytest.mark.skipif(not _core.HAS_OPENMP, reason="built without OpenMP")
def test_threads_of_openmp_may_have_any_mode():
    code = WORKERS.format(tests=str(Path(__file__).parent), mode=MODES["flushing"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


HEADER = Path(__file__).parent.parent / "src" / "bnfast" / "_kernels" / "float_mode.h"
CHECK = Path(__file__).parent / "c" / "float_mode_check.c"


@pytest.mark.skipif(not HEADER.is_file(), reason="needs the source tree")
@pytest.mark.parametrize(
    ("compiler", "runner"),
    [(["gcc"], []), (["clang"], []), (["aarch64-linux-gnu-gcc", "-static"], ["qemu-aarch64"])],
    ids=["gcc", "clang", "aarch64"],
)
def test_the_mode_in_c(tmp_path, compiler, runner):
    missing = [name for name in (compiler[0], *runner) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {missing}")
    program = tmp_path / "check"
    flags = ["-std=c11", "-O3", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    command = [*compiler, *flags, f"-I{HEADER.parent}", str(CHECK), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_a_guarded_function_is_like_a_function():
    function = bnfast.batch_norm
    assert pickle.loads(pickle.dumps(function)) is function
    assert repr(function) == repr(function.__wrapped__)
    assert (function.__name__, function.__module__) == ("batch_norm", "bnfast.functional.batch")
    assert inspect.isroutine(function) and inspect.getsource(function).startswith("@")
    layer = bnfast.BatchNorm(2)
    assert layer.backward.__self__ is layer
    assert bnfast.BatchNorm.backward is type(layer).backward
    with pytest.raises(TypeError, match=r"batch_norm\(\) missing"):
        function()
    for arguments in ((), (1,), (len, len)):
        with pytest.raises(TypeError):
            _core.GuardedFunction(*arguments)
    with pytest.raises(TypeError):
        _core.GuardedFunction(function=len)
