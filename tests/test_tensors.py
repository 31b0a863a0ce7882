"""Arrays that are not NumPy's: taken without a copy, or refused in a sentence that says how."""

import types

import numpy as np
import pytest

import bnfast

MEAN, VAR = np.zeros(3, np.float32), np.ones(3, np.float32)
X = np.arange(12, dtype=np.float32).reshape(4, 3)


class DLPackOnly:
    """What offers its memory by DLPack and in no other way."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def evaluated(x, **others):
    return bnfast.batch_norm(x, MEAN, VAR, **others)


def test_what_has_dlpack_alone_is_read():
    np.testing.assert_array_equal(evaluated(DLPackOnly(X)), evaluated(X))
    np.testing.assert_array_equal(bnfast.GroupNorm(1, 3)(DLPackOnly(X)), bnfast.GroupNorm(1, 3)(X))
    assert bnfast.moments(DLPackOnly(X)) == bnfast.moments(X)


def test_the_memory_of_what_has_dlpack_alone_is_not_written_over():
    weight = np.ones(6, np.float32)
    with pytest.raises(ValueError, match=r"out must.* weight"):
        bnfast.batch_norm(X[:2], MEAN, VAR, DLPackOnly(weight[:3]), out=weight.reshape(2, 3))


def test_a_list_of_objects_is_no_array():
    with pytest.raises(TypeError, match=r"float32 or float64 .* got object array"):
        evaluated([[object()]])


@pytest.mark.parametrize(
    ("spoil", "instead"),
    [
        (lambda t: t.requires_grad_(), r"x\.detach\(\) is one"),
        (lambda t: t.bfloat16().requires_grad_(), r"x\.detach\(\) is one"),
        (lambda t: t.to("meta"), "x must be an array, got .*: "),
    ],
    ids=["requires_grad", "bfloat16", "meta"],
)
def test_a_tensor_without_an_array_says_what_to_write(torch, spoil, instead):
    x = spoil(torch.from_numpy(X.copy()))
    for call in (evaluated, bnfast.BatchNorm(3)):
        with pytest.raises(TypeError, match=instead):
            call(x)


class OnADevice:
    """What PyTorch's tensors on a device do, with the memory of an array."""

    requires_grad = True
    device = types.SimpleNamespace(type="cuda")

    def __init__(self, array, steps=("detach", "cpu")):
        self.array, self.steps = array, steps

    def __array__(self, dtype=None, copy=None):
        if self.steps:
            raise TypeError("can't convert")
        return self.array

    def detach(self):
        return OnADevice(self.array, [step for step in self.steps if step != "detach"])

    def cpu(self):
        return OnADevice(self.array, [step for step in self.steps if step != "cpu"])


def test_states_take_tensors_on_a_device_and_calls_say_what_to_write():
    layer = bnfast.GroupNorm(1, 3)
    layer.load_state_dict({"weight": OnADevice(MEAN), "bias": OnADevice(VAR)})
    np.testing.assert_array_equal([layer.weight, layer.bias], [MEAN, VAR])
    with pytest.raises(TypeError, match=r"x\.detach\(\)\.cpu\(\) is one"):
        evaluated(OnADevice(X))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_tensors_of_16_bits_are_read(torch, name):
    pytest.importorskip("ml_dtypes")
    x = torch.from_numpy(X).to(getattr(torch, name))
    wide = x.float().numpy()
    assert bnfast.moments(x) == bnfast.moments(wide)
    y = evaluated(x)
    assert y.dtype.name == name
    np.testing.assert_array_equal(y, evaluated(wide).astype(y.dtype))


def test_tensors_that_would_be_written_to_say_what_to_write(torch):
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(TypeError, match=r"running_mean\.detach\(\)\.numpy\(\) is its memory"):
        bnfast.batch_norm(X, mean, var, training=True)
    with pytest.raises(TypeError, match=r"out\.detach\(\)\.numpy\(\) is its memory"):
        evaluated(X, out=torch.empty(4, 3))
    bnfast.batch_norm(X, mean.detach().numpy(), var.detach().numpy(), training=True)
    assert mean.abs().min() > 0


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_states_take_the_parameters_of_a_module(torch, name):
    module = torch.nn.BatchNorm1d(3).to(getattr(torch, name))
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    assert state["weight"].requires_grad
    layer = bnfast.BatchNorm(3)
    layer.load_state_dict(state)
    np.testing.assert_array_equal(layer.weight, module.weight.detach().float().numpy())


def test_the_state_of_a_whole_model_is_read_by_a_prefix(torch):
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    network(torch.from_numpy(X))
    layer = bnfast.BatchNorm(3)
    layer.load_state_dict(network.state_dict(), prefix="1.")
    np.testing.assert_array_equal(layer.running_mean, network[1].running_mean.numpy())
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_states_refuse_masks(dtype):
    masked = np.ma.array(np.ones(3, dtype), mask=[True, False, False])
    with pytest.raises(TypeError, match="weight must be an array without a mask"):
        bnfast.GroupNorm(1, 3).load_state_dict({"weight": masked, "bias": MEAN})


def test_errors_about_a_prefix_have_the_whole_names():
    state, layer = bnfast.BatchNorm(3).state_dict(prefix="bn1."), bnfast.BatchNorm(3)
    layer.load_state_dict(state | {"other": 1, 7: 2}, prefix="bn1.")
    with pytest.raises(ValueError, match=r"missing \['bn2\.weight'"):
        layer.load_state_dict(state, prefix="bn2.")
    with pytest.raises(ValueError, match=r"unexpected \['bn1\.extra'\]"):
        layer.load_state_dict(state | {"bn1.extra": 1}, prefix="bn1.")
    with pytest.raises(ValueError, match=r"bn1\.bias must have one value for each"):
        layer.load_state_dict(state | {"bn1.bias": np.ones(2)}, prefix="bn1.")
    for call in (layer.state_dict, lambda prefix: layer.load_state_dict(state, prefix=prefix)):
        with pytest.raises(TypeError, match="prefix must be a string, got 1"):
            call(prefix=1)


def test_the_state_of_a_whole_model_without_the_right_prefix_is_told_those_that_fit():
    layer, wider = bnfast.BatchNorm(3), bnfast.BatchNorm(4)
    model = {f"conv{n}.weight": np.ones((4, 3)) for n in range(100)}
    model |= layer.state_dict(prefix="a.bn.") | wider.state_dict(prefix="b.bn.")
    model |= layer.state_dict(prefix="c.")
    for prefix in ("", "a.bn", "a.", "norm."):
        with pytest.raises(
            ValueError, match=r"; of a whole model, prefix='a\.bn\.' or 'c\.'$"
        ) as told:
            layer.load_state_dict(model, prefix=prefix)
        assert len(str(told.value)) < 600
    with pytest.raises(ValueError, match=r"missing \['weight', [^;]*$"):
        layer.load_state_dict({"weights": 0})
    with pytest.raises(ValueError, match=r"must have the names \[\]: unexpected [^;]*$"):
        bnfast.InstanceNorm(3).load_state_dict(model)
