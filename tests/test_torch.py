"""PyTorch's modules with bnfast's kernels, its custom operations, and synchronized batch norm."""

import copy
import io

import numpy as np
import pytest

import bnfast
from tolerances import CLOSE_F32, CLOSE_F64

torch = pytest.importorskip("torch")

from bnfast.integrations import torch as door  # noqa: E402
from bnfast.integrations.torch import modules  # noqa: E402
from bnfast.integrations.torch.functions import Normalization, normalize  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning"
)  # PyTorch's own calls

nn = torch.nn
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"f32": torch.float32, "f64": torch.float64}

MODULES = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (6, 4, 5)),
    "BatchNorm1d of rows": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (2, 4, 3, 2, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (3, 4, 5, 2)),
    "of batches alone": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 5, 2)),
    "without parameters": (lambda: nn.BatchNorm2d(4, eps=1e-3, affine=False), (3, 4, 5, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 7)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4), (3, 4, 5, 2)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4, affine=True), (3, 4, 2, 3, 2)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5, 2)),
    "RMSNorm": (lambda: nn.RMSNorm((5, 2)), (3, 4, 5, 2)),
    "RMSNorm of rows": (lambda: nn.RMSNorm(4, eps=0.1), (3, 4)),
}


@pytest.fixture
def calls(monkeypatch):
    """Counts what the kernels are called for."""
    counted = {"forward": 0, "backward": 0, "double_backward": 0}
    function = Normalization._function

    def counting(self, form):
        counted[form] = counted.get(form, 0) + 1
        return function(self, form)

    monkeypatch.setattr(Normalization, "_function", counting)
    return counted


def tensors(shape, dtype, layout="contiguous"):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator, dtype=dtype) * 2 + 1 for _ in range(2))
    if layout == "channels_last" and len(shape) == 4:
        return x.to(memory_format=torch.channels_last), dy.to(memory_format=torch.channels_last)
    return x, dy


def assert_close(got, expected, factor=8):
    close = CLOSE_F32 if expected.dtype == torch.float32 else CLOSE_F64
    size = expected.detach().abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(got, expected, rtol=factor * close, atol=factor * close * (1 + size))


def both(make, dtype):
    """A module of PyTorch's with its own parameters, and one that bnfast computes."""
    torch.manual_seed(1)
    stock = make().to(dtype)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.uniform_(-1, 2)
    ours = copy.deepcopy(stock)
    assert len(door.accelerate(ours).swapped) == 1
    return stock, ours


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", MODULES)
def test_training_is_that_of_the_module(calls, name, dtype, layout):
    make, shape = MODULES[name]
    stock, ours = both(make, dtype)
    x, dy = tensors(shape, dtype, layout)
    for _ in range(3):
        found = []
        for module in (stock, ours):
            leaf = x.clone().requires_grad_()
            module.zero_grad()
            y = module(leaf)
            y.backward(dy)
            found.append([y, leaf.grad, *(p.grad for p in module.parameters())])
        for got, expected in zip(found[1], found[0], strict=True):
            assert_close(got, expected)
        assert found[1][0].stride() == x.stride()
        for key, expected in stock.state_dict().items():
            assert_close(ours.state_dict()[key], expected)
        x = x * 1.5 + 1
    assert calls["forward"] == calls["backward"] == 3


@pytest.mark.parametrize("layout", FORMATS)
def test_a_network_is_trained_alike(layout):
    torch.manual_seed(0)
    stock = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        *(nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.InstanceNorm2d(4)),
        *(nn.Flatten(), nn.Linear(4 * 6 * 6, 16), nn.RMSNorm(16), nn.Linear(16, 5)),
    ).to(torch.float64, memory_format=FORMATS[layout])
    ours = copy.deepcopy(stock)
    assert len(door.accelerate(ours).swapped) == 4
    x = torch.randn(6, 3, 12, 12, dtype=torch.float64).to(memory_format=FORMATS[layout])
    labels = torch.arange(6) % 5
    for model in (stock, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    assert list(ours.state_dict()) == list(stock.state_dict())
    for key, expected in stock.state_dict().items():
        assert_close(ours.state_dict()[key], expected, factor=1e3)
    stock.eval()
    ours.eval()
    assert_close(ours(x), stock(x), factor=1e3)


def test_a_module_stays_what_it_is_and_can_be_given_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    hooked = []
    hook = model[1].register_forward_hook(lambda *_: hooked.append(1))
    before = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    parameters = [id(p) for p in model.parameters()]
    report = door.accelerate(model)
    assert [(entry.path, entry.kind) for entry in report.swapped] == [
        ("1", "BatchNorm2d"),
        ("2", "GroupNorm"),
    ]
    assert isinstance(model[1], nn.BatchNorm2d)
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == before
    assert [id(p) for p in model.parameters()] == parameters
    assert str(door.accelerate(model)) == str(report)  # again, which changes nothing
    model(torch.randn(2, 3, 4, 4))
    assert hooked == [1]
    hook.remove()
    for copied in (copy.deepcopy(model), pickled(model)):
        assert type(copied[1]) is modules.BatchNorm2d
        assert_close(copied(torch.ones(2, 3, 4, 4)), model(torch.ones(2, 3, 4, 4)))
    door.restore(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[2]) is nn.GroupNorm


@pytest.mark.parametrize("function", [door.accelerate, door.restore])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got None of type"):
        function(None)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("layout", FORMATS)
def test_no_tensor_is_copied(monkeypatch, layout):
    x, dy = tensors((2, 4, 3, 3), torch.float32, layout)
    seen = []
    forward = bnfast.batch_norm_forward
    backward = bnfast.batch_norm_backward

    def noting(function):
        def call(*arguments, out, **keywords):
            seen.append([array.ctypes.data for array in (*arguments[:2], out) if array.ndim == 4])
            return function(*arguments, out=out, **keywords)

        return call

    monkeypatch.setattr(bnfast, "batch_norm_forward", noting(forward))
    monkeypatch.setattr(bnfast, "batch_norm_backward", noting(backward))
    module = nn.BatchNorm2d(4)
    door.accelerate(module)
    y = module(x.requires_grad_())
    y.backward(dy)
    assert seen[0] == [x.data_ptr(), y.data_ptr()]
    assert seen[1][:2] == [dy.data_ptr(), x.data_ptr()]
    assert x.grad.stride() == x.stride()


STEMS = {
    "batch_norm": ((), (), 3),
    "instance_norm": ((), (), 3),
    "group_norm": ((3,), (), 3),
    "layer_norm": (((5,),), ((5,),), 5),
    "rms_norm": (((5,),), ((5,),), 5),
}


def made(stem, eps=1e-2):
    """The function of a stem, and tensors of float64 for it."""
    before, between, size = STEMS[stem]
    torch.manual_seed(0)
    shapes = [(4, 3, 5), *[(size,)] * (1 if stem == "rms_norm" else 2)]
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(x, weight=None, bias=None):
        return normalize(x, weight, bias, Normalization(stem, eps, before, between))

    return function, arguments


@pytest.mark.parametrize("stem", STEMS)
def test_gradients_of_both_modes_and_of_gradients(calls, stem):
    function, arguments = made(stem)
    batched = {"check_batched_grad": True}
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, arguments, **batched, **forward)
    assert torch.autograd.gradgradcheck(function, arguments, **batched, check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(function, arguments[:1])  # without parameters
    assert torch.autograd.gradgradcheck(function, arguments[:1])
    assert calls["double_backward"] > 0


def decomposed(stem):
    """The same of elementary operations, whose derivatives of any order are PyTorch's."""

    def function(x):
        dims = {"batch_norm": (0, 2), "group_norm": (2,), "instance_norm": (2,)}.get(stem, (-1,))
        deviation = x if stem == "rms_norm" else x - x.mean(dims, keepdim=True)
        return deviation / (deviation.square().mean(dims, keepdim=True) + 1e-2).sqrt()

    return function


@pytest.mark.parametrize("stem", STEMS)
def test_derivatives_of_third_and_fourth_order(stem):
    function, (x, *_) = made(stem)
    found = []
    for f in (function, decomposed(stem)):
        y, derivatives = f(x).pow(3).sum(), []
        for _ in range(4):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            derivatives.append(g.detach())
            y = g.pow(2).sum() / g.detach().abs().max()
        found.append(derivatives)
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected, factor=100)


@pytest.mark.parametrize("mode", ["batches of vectors", "batches of both", "forward", "both"])
@pytest.mark.parametrize("stem", STEMS)
def test_backward_passes_can_be_batched_and_differentiated_forward(stem, mode):
    function, (x, *_) = made(stem)
    tangent = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    found = []
    for f in (function, decomposed(stem)):
        if mode == "batches of vectors":
            y, vectors = f(x), torch.stack((tangent, tangent**2))
            found.append(torch.autograd.grad(y, x, vectors, is_grads_batched=True))
        elif mode == "batches of both":

            def cubes(inputs, f=f):
                return f(inputs).pow(3).sum()

            found.append((torch.autograd.functional.hessian(cubes, x, vectorize=True),))
        else:
            with torch.autograd.forward_ad.dual_level():
                y = f(torch.autograd.forward_ad.make_dual(x, tangent)).pow(3).sum()
                (g,) = torch.autograd.grad(y, x, create_graph=mode == "both")
                found.append([torch.autograd.forward_ad.unpack_dual(g).tangent])
                if mode == "both":
                    found[-1] += torch.autograd.grad(found[-1][0].square().sum(), x)
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected, factor=100)


def test_tensors_that_are_not_what_their_memory_holds():
    module = nn.BatchNorm2d(3)
    door.accelerate(module)
    x, dy = tensors((2, 3, 4, 4), torch.float32)
    for seen, upstream in ((x, dy), (torch._neg_view(-x), torch._neg_view(-dy))):
        leaf = seen.clone().requires_grad_()
        y = module(seen)
        assert_close(y, nn.functional.batch_norm(x, None, None, training=True))
        module(leaf).backward(upstream)
        assert_close(leaf.grad, gradient_of_batch_norm(x, dy))
    zero = torch._efficientzerotensor(x.shape)
    leaf = x.clone().requires_grad_()
    assert_close(torch.autograd.grad(module(leaf), leaf, zero)[0], torch.zeros_like(x))


def gradient_of_batch_norm(x, dy):
    leaf = x.clone().requires_grad_()
    nn.functional.batch_norm(leaf, None, None, training=True).backward(dy)
    return leaf.grad


# But for a momentum that is the number of a batch, which make_fx cannot record.
@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"cumulative"}))
def test_a_graph_of_a_call_is_of_pytorchs_operations(calls, name):
    from torch.fx.experimental.proxy_tensor import make_fx

    make, shape = MODULES[name]
    stock, ours = both(make, torch.float64)
    x, other = tensors(shape, torch.float64)
    assert_close(make_fx(ours)(x)(other), stock(other))
    assert calls["forward"] == 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_bnfast_does_not_compute_is_left_to_pytorch(calls):
    module = nn.BatchNorm2d(3)
    door.accelerate(module)
    x = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    torch.compile(module, backend="eager", fullgraph=True)(x)
    torch.jit.trace(module, x, check_trace=False)
    torch.func.vmap(torch.func.functional_call, (None, None, 0))(
        copy.deepcopy(module).eval(), dict(module.named_buffers()), x[None]
    )
    module.eval()(x)
    module.to(torch.bfloat16).train()(x.to(torch.bfloat16))
    nn.GroupNorm(1, 3)(x)
    assert calls["forward"] == 0


def test_errors_are_pytorchs():
    module = nn.BatchNorm1d(3)
    door.accelerate(module)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.randn(1, 3))
    with pytest.raises(ValueError, match="2D or 3D"):
        module(torch.randn(2, 3, 4, 4))
    before = copy.deepcopy(module.state_dict())
    with torch.inference_mode():
        inference = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(inference)
    torch.testing.assert_close(module.running_mean, before["running_mean"])
    empty = torch.randn(0, 3)
    assert module(empty).shape == empty.shape


@pytest.mark.filterwarnings("ignore:Mismatch dtype|input.s size:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 5, 2), (2, 3, 2, 5), (7,)], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_inputs_that_fit_no_module_are_refused_as_by_pytorch(name, shape, dtype):
    found = []
    for module in both(MODULES[name][0], torch.float32):
        try:
            found.append(module(torch.ones(shape, dtype=dtype)).shape)
        except (RuntimeError, ValueError) as error:
            found.append(str(error))
    assert found[1] == found[0]


def test_the_report_says_what_is_left_and_why():
    lazy = nn.LazyBatchNorm2d()
    model = nn.ModuleDict(
        {
            "layer": nn.LayerNorm(4),
            "local": nn.LocalResponseNorm(2),
            "tracked": nn.InstanceNorm2d(4, track_running_stats=True),
            "narrow": nn.BatchNorm2d(4).to(torch.float16),
            "meta": nn.BatchNorm2d(4, device="meta"),
            "lazy": lazy,
            "own": type("Own", (nn.BatchNorm2d,), {})(4),
            "swapped": nn.BatchNorm2d(4),
        }
    )
    report = door.accelerate(model)
    assert [entry.path for entry in report.swapped] == ["swapped"]
    reasons = {entry.path: entry.reason for entry in report.left}
    assert reasons == {
        "layer": "PyTorch is faster",
        "local": "bnfast has no kernel for this class",
        "tracked": "it has running statistics",
        "narrow": "its dtype is float16",
        "meta": "it is on the device meta",
        "lazy": "its sizes are not known before its first call: accelerate after that",
        "own": "bnfast has no kernel for this class",
    }
    assert "left to PyTorch" in str(report) and "1 of 8" in str(report)
    lazy(torch.randn(2, 3, 4, 4))
    assert type(lazy) is nn.BatchNorm2d
    assert [entry.path for entry in door.accelerate(model).swapped] == ["lazy", "swapped"]


# Custom operations


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bare", [False, True])
def test_the_operations_keep_pytorchs_rules(layout, dtype, bare):
    x, dy = tensors((3, 4, 2, 3), dtype, layout)
    weight, bias, mean = torch.randn(3, 4, dtype=dtype).unbind()
    statistics = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    given = [None] * 4 if bare else [weight, bias, mean, torch.ones(4, dtype=dtype)]
    for tensor in (x, *given[:2]):
        if tensor is not None:
            tensor.requires_grad_()
    operations = torch.ops.bnfast
    torch.library.opcheck(operations.batch_norm.default, (x, *given, 0.1, 1e-5))
    of_backward = dy.requires_grad_(), x, *statistics, given[0]
    torch.library.opcheck(operations.batch_norm_backward.default, of_backward)
    upstream = [None, weight.detach(), None] if bare else [dy.detach() + 1, weight.detach(), mean]
    inputs = [t if t is None else t.detach().clone() for t in of_backward]
    torch.library.opcheck(operations.batch_norm_double_backward.default, (*upstream, *inputs))


def test_the_operation_is_differentiable_twice():
    def function(x, weight, bias):
        return door.batch_norm(x, None, None, weight, bias, True, eps=1e-2)

    _, arguments = made("batch_norm")
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("given", [(torch.zeros(3), None), (None, torch.ones(3))])
def test_running_statistics_are_given_together(given):
    with pytest.raises((TypeError, ValueError), match="running_mean and running_var"):
        door.batch_norm(torch.randn(4, 3), *given, training=True)


def test_the_operation_refuses_other_types():
    for dtype in (torch.bfloat16, torch.float16, torch.int32):
        with pytest.raises(TypeError, match=r"float32 or float64.*, got"):
            door.batch_norm(torch.ones(4, 3, dtype=dtype), None, None, training=True)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        norm = self.norm
        running = norm.running_mean, norm.running_var
        return door.batch_norm(x * 2, *running, norm.weight, norm.bias, self.training) + 1


def test_a_model_with_the_operation_is_exported():
    x = torch.randn(4, 3, 5, 5)
    exported = torch.export.export(Network(), (x,))
    assert "bnfast.batch_norm" in str(exported.graph)
    assert_close(exported.module()(x), Network()(x))


def test_a_model_with_the_operation_is_compiled_whole():
    x = torch.randn(4, 3, 5, 5)
    model, compiled = Network(), Network()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for function in (model, run):
        function(x).square().sum().backward()
    assert_close(run(x), model(x))
    assert_close(compiled.norm.weight.grad, model.norm.weight.grad)
    assert_close(compiled.norm.running_var, model.norm.running_var)
    model.eval()
    assert_close(
        model(x),
        nn.functional.batch_norm(
            x * 2,
            model.norm.running_mean,
            model.norm.running_var,
            model.norm.weight,
            model.norm.bias,
        )
        + 1,
    )


@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "instance_norm", "rms_norm"])
def test_the_samples_of_pytorchs_own_tests(name):
    pytest.importorskip("expecttest")  # imported by PyTorch's own test package
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (
        op for op in op_db if op.name == f"nn.functional.{name}" and not op.variant_test_name
    )
    compared = 0
    for dtype in (torch.float32, torch.float64):
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            ours, theirs = (copied(sample) for _ in range(2))
            expected = info.op(theirs[0], *theirs[1], **theirs[2])
            got = of_sample(name, *ours)
            if got is None:
                continue
            compared += 1
            assert_close(got, expected)
            for y in (got, expected):
                y.sum().backward() if y.requires_grad else None
            pairs = zip(leaves(ours), leaves(theirs), strict=True)
            for mine, other in pairs:
                if other.grad is not None:
                    assert_close(mine.grad, other.grad, factor=100)
                else:
                    assert_close(mine, other)
    assert compared >= (2 if name == "instance_norm" else 10)


def copied(sample):
    def own(value):
        if torch.is_tensor(value):
            return value.detach().clone().requires_grad_(value.requires_grad)
        return value

    keywords = {key: own(value) for key, value in sample.kwargs.items()}
    return own(sample.input), [own(value) for value in sample.args], keywords


def leaves(sample):
    x, arguments, keywords = sample
    return [t for t in (x, *arguments, *keywords.values()) if torch.is_tensor(t)]


def of_sample(name, x, arguments, keywords):
    """What bnfast makes of a sample, or None where the door leaves it to PyTorch."""
    if name == "batch_norm":
        return door.batch_norm(x, *arguments, **keywords) if x.numel() else None
    weight, bias, eps = (keywords.get(key) for key in ("weight", "bias", "eps"))
    if name == "instance_norm":
        own = keywords.get("use_input_stats", True) and keywords.get("running_mean") is None
        call = Normalization(name, 1e-5 if eps is None else eps) if own else None
    elif name == "group_norm":
        call = Normalization(name, 1e-5 if eps is None else eps, (arguments[0],))
    else:
        shape = (tuple(arguments[0]),)
        weight = arguments[1] if len(arguments) > 1 else weight
        call = Normalization(name, eps, shape, shape)
    return None if call is None or not x.numel() else normalize(x, weight, bias, call)


# Synchronized batch norm of one process; of several: test_distributed_processes.py


class Alone(bnfast.distributed.Communicator):
    rank, size = 0, 1

    def allgather(self, block):
        return block[np.newaxis]


@pytest.mark.parametrize("layout", FORMATS)
def test_synchronized_batch_norm_of_one_process_is_batch_norm(layout):
    stock = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=None)).double()
    ours = door.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stock), Alone())
    assert [type(m) for m in ours] == [door.SyncBatchNorm, nn.ReLU, door.SyncBatchNorm]
    assert list(ours.state_dict()) == list(stock.state_dict())
    x, dy = tensors((3, 4, 5, 2), torch.float64, layout)
    for _ in range(2):
        gradients = []
        for model in (stock, ours):
            leaf = x.clone().requires_grad_()
            model.zero_grad()
            model(leaf).backward(dy)
            gradients.append([leaf.grad, *(p.grad for p in model.parameters())])
        for got, expected in zip(*reversed(gradients), strict=True):
            assert_close(got, expected, factor=100)
        for key, expected in stock.state_dict().items():
            assert_close(ours.state_dict()[key], expected)
    assert_close(ours.eval()(x), stock.eval()(x))


def test_synchronized_modules_stay_what_they_are():
    norm = nn.BatchNorm2d(4, bias=False)
    model = nn.ModuleDict({"one": norm, "again": norm, "inside": nn.Sequential(norm)})
    hooked = []
    norm.register_forward_hook(lambda *_: hooked.append(1))
    before = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    assert door.SyncBatchNorm.convert_sync_batchnorm(model, Alone()) is model
    assert model["one"] is model["again"] is model["inside"][0]
    assert type(norm) is door.SyncBatchNorm
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == before
    assert str(door.accelerate(model)).startswith("bnfast computes 1 of 1")
    run = torch.compile(model["inside"], backend="eager")
    x, _ = tensors((3, 4, 5, 2), torch.float32)
    expected = nn.functional.batch_norm(x, None, None, norm.weight, training=True)
    assert_close(run(x), expected)
    assert hooked == [1]
    lazy = nn.Sequential(nn.BatchNorm2d(4), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="got LazyBatchNorm2d at '1': convert after"):
        door.SyncBatchNorm.convert_sync_batchnorm(lazy, Alone())
    assert type(lazy[0]) is nn.BatchNorm2d


def test_synchronized_batch_norm_needs_processes():
    with pytest.raises(RuntimeError, match="init_process_group"):
        door.SyncBatchNorm(4)
    with pytest.raises(TypeError, match="module must be"):
        door.SyncBatchNorm.convert_sync_batchnorm("model", Alone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["bnfast's", "synchronized", "left to PyTorch"])
def test_checkpointed_training_counts_batches_once(dtype, momentum, kind, monkeypatch):
    from contextlib import nullcontext

    from torch.utils.checkpoint import checkpoint

    if kind == "left to PyTorch":
        monkeypatch.setattr(modules, "_is_computed", lambda *_: False)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU())
    plain = plain.to(dtype)
    if kind == "synchronized":
        door.SyncBatchNorm.convert_sync_batchnorm(plain, Alone())
    else:
        door.accelerate(plain)
    checkpointed = copy.deepcopy(plain)
    for _ in range(3):
        x = torch.randn(5, 3, 6, 6, dtype=dtype)
        expected = plain(x)
        y = checkpoint(
            *(checkpointed, x),
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), door.recomputing()),
        )
        assert torch.equal(y, expected)
        for output in (expected, y):
            output.square().sum().backward()
    for (name, one), (_, other) in zip(
        *(m.state_dict().items() for m in (plain, checkpointed)), strict=True
    ):
        assert torch.equal(one, other), name
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_recomputing_ends_with_its_block_and_leaves_evaluation_alone():
    module = nn.BatchNorm1d(4)
    door.accelerate(module)
    x = torch.randn(9, 4)
    with pytest.raises(ValueError, match="expected 2D or 3D input"), door.recomputing():
        module(torch.randn(3, 4, 5, 6))
    module(x)
    assert int(module.num_batches_tracked) == 1
    module.eval()
    expected = module(x)
    with door.recomputing():
        assert torch.equal(module(x), expected)
