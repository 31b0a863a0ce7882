"""Layers made of those of PyTorch and Keras compute the same, in both modes, and age alike."""

import copy
import types

import numpy as np
import pytest

import bnfast
from bnfast._conventions import KERAS_LAYERS, PYTORCH_LAYERS
from tolerances import CLOSE_F32

# The frameworks' own float32 arithmetic, on data whose mean is half of their standard deviation.
# Keras's NumPy backend rounds float64, too, to float32 on the way.
CLOSE = 1e-5
SMALL_VARIANCE = 1e-3  # as small as eps, which is then half of the result


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


@pytest.fixture
def keras():
    return pytest.importorskip("keras")


def data(rng, *shape, dtype=np.float32, scale=2.0):
    return rng.normal(scale / 2, scale, shape).astype(dtype)


def numbers(tensor):
    return tensor.detach().numpy()


def randomized(torch, module):
    """The module, with parameters and statistics that are not what they began as."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                small = SMALL_VARIANCE if name == "running_var" else 1.0
                tensor.copy_(torch.rand(tensor.shape) * small + small / 10)
    return module


def agree(ours, theirs, dtype=np.float32, tolerance=CLOSE):
    assert np.asarray(ours).dtype == dtype
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


# PyTorch

BATCH_NORMS = {
    "1d": ("BatchNorm1d", {}, (8, 3)),
    "1d of sequences": ("BatchNorm1d", {}, (4, 3, 5)),
    "2d": ("BatchNorm2d", {"eps": 1e-3, "momentum": 0.3}, (4, 3, 5, 6)),
    "3d": ("BatchNorm3d", {}, (2, 3, 4, 3, 2)),
    "plain average": ("BatchNorm2d", {"momentum": None}, (4, 3, 5, 6)),
    "not affine": ("BatchNorm2d", {"affine": False}, (4, 3, 5, 6)),
    "no bias": ("BatchNorm2d", {"bias": False}, (4, 3, 5, 6)),
    "not tracked": ("BatchNorm2d", {"track_running_stats": False}, (4, 3, 5, 6)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm_is_that_of_pytorch(torch, rng, dtype, name, training):
    kind, given, shape = BATCH_NORMS[name]
    make = getattr(torch.nn, kind)
    module = randomized(torch, make(3, dtype=getattr(torch, dtype.name), **given))
    module.train(training)
    scale = 0.03 if training else 2.0  # variances of a batch as small as eps, too
    x = data(rng, *shape, dtype=dtype, scale=scale)
    layer = bnfast.BatchNorm.from_torch(module)
    assert (layer.training, layer.dtype) == (training, dtype)
    tolerance = CLOSE if dtype == np.float32 else 1e-10
    for _ in range(3):
        agree(layer(x), numbers(module(torch.from_numpy(x))), dtype, tolerance)
    theirs = {name: numbers(tensor) for name, tensor in module.state_dict().items()}
    ours = layer.state_dict()
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=CLOSE, atol=CLOSE)


def test_what_a_layer_is_made_of_stays_as_it_is(torch, rng):
    module = randomized(torch, torch.nn.BatchNorm1d(3))
    before = copy.deepcopy(module.state_dict())
    layer = bnfast.BatchNorm.from_torch(module)
    layer(data(rng, 8, 3))
    layer.weight += 1
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_statistics_that_are_no_longer_tracked_are_still_evaluated_with(torch, rng):
    module = randomized(torch, torch.nn.BatchNorm1d(3))
    module.track_running_stats = False
    layer, x = bnfast.BatchNorm.from_torch(module), data(rng, 8, 3)
    agree(layer(x), numbers(module(torch.from_numpy(x))))
    np.testing.assert_array_equal(layer.running_mean, numbers(module.running_mean))
    agree(layer.eval()(x), numbers(module.eval()(torch.from_numpy(x))))


def test_a_synchronized_module_is_one_of_a_single_process(torch, rng):
    module = randomized(torch, torch.nn.SyncBatchNorm(3, eps=1e-3)).eval()
    x = data(rng, 8, 3)
    agree(bnfast.BatchNorm.from_torch(module)(x), numbers(module(torch.from_numpy(x))))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_modules_of_16_bits_become_float32_of_the_same_values(torch, rng, name):
    module = randomized(torch, torch.nn.BatchNorm1d(3)).to(getattr(torch, name)).eval()
    layer, x = bnfast.BatchNorm.from_torch(module), data(rng, 8, 3)
    assert layer.dtype == np.float32
    agree(layer(x), numbers(module.float()(torch.from_numpy(x))))


def test_modules_that_accelerate_has_swapped_are_taken(torch, rng):
    from bnfast.integrations.torch import accelerate

    network = torch.nn.Sequential(torch.nn.BatchNorm1d(3, eps=1e-2))
    accelerate(network)
    x = data(rng, 8, 3)
    agree(bnfast.BatchNorm.from_torch(network[0])(x), numbers(network(torch.from_numpy(x))))


@pytest.mark.parametrize("ours", [bnfast.BatchNorm, bnfast.GroupNorm, bnfast.LayerNorm])
def test_of_a_state_it_is_said_what_loads_it(ours):
    state = ours(*[4] * (2 if ours is bnfast.GroupNorm else 1)).state_dict()
    for take in (ours.from_torch, ours.from_keras):
        with pytest.raises(TypeError, match=r"no \w+; a state goes .* by load_state_dict$"):
            take(state)


def test_of_weights_in_a_list_it_is_said_how_to_give_them():
    weights = [np.ones(3), np.zeros(3), np.zeros(3), np.ones(3)]
    with pytest.raises(TypeError, match=r"weights alone are from_keras\(\*weights\)$"):
        bnfast.BatchNorm.from_keras(weights)
    assert bnfast.BatchNorm.from_keras(*weights).num_features == 3
    for take in (bnfast.BatchNorm.from_torch, bnfast.LayerNorm.from_keras):
        with pytest.raises(TypeError, match=r"of type list, which has no \w+$"):
            take(weights)


def test_a_module_on_no_device_is_refused(torch):
    module = torch.nn.BatchNorm1d(3, device="meta")
    with pytest.raises(TypeError, match=r"^module\.weight must be an array, got .*: Cannot copy"):
        bnfast.BatchNorm.from_torch(module)


def test_a_lazy_module_is_refused_until_it_has_seen_a_batch(torch, rng):
    module, x = torch.nn.LazyBatchNorm1d(), data(rng, 8, 3)
    with pytest.raises(ValueError, match=r"LazyBatchNorm1d, which has none yet: call it on a"):
        bnfast.BatchNorm.from_torch(module)
    module(torch.from_numpy(x))
    assert bnfast.BatchNorm.from_torch(module).num_batches_tracked == 1


def test_other_modules_are_refused(torch):
    class Own(torch.nn.BatchNorm2d):
        def forward(self, x):
            return torch.relu(super().forward(x))

    class Plain(torch.nn.BatchNorm2d):
        pass

    assert bnfast.BatchNorm.from_torch(Plain(3)).num_features == 3
    patched = torch.nn.BatchNorm2d(3)
    patched.forward = lambda x: 2 * x
    with pytest.raises(TypeError, match="BatchNorm2d, which has a forward of its own and may"):
        bnfast.BatchNorm.from_torch(patched)
    with pytest.raises(TypeError, match="Own, which has a forward of its own and may"):
        bnfast.BatchNorm.from_torch(Own(3))
    others = [torch.nn.GroupNorm(1, 3), torch.nn.Linear(3, 3)]
    others += [torch.nn.Sequential(torch.nn.BatchNorm2d(3))]
    others += [torch.ao.nn.quantized.BatchNorm2d(3)]
    for module in others:
        with pytest.raises(
            TypeError, match=r"^module must be a BatchNorm1d, .* of PyTorch, got an"
        ):
            bnfast.BatchNorm.from_torch(module)


def test_a_module_of_another_layer_is_sent_there(torch, keras, rng):
    with pytest.raises(TypeError, match=r"\.InstanceNorm2d, for InstanceNorm\.from_torch$"):
        bnfast.BatchNorm.from_torch(torch.nn.InstanceNorm2d(3))
    with pytest.raises(TypeError, match=r"\.BatchNorm2d, for BatchNorm\.from_torch$"):
        bnfast.GroupNorm.from_torch(torch.nn.BatchNorm2d(3))
    grouped = built(keras.layers.GroupNormalization(groups=2), (2, 4), rng)
    with pytest.raises(TypeError, match=r", for InstanceNorm\.from_keras or GroupNorm\."):
        bnfast.LayerNorm.from_keras(grouped)
    with pytest.raises(TypeError, match=r"an instance of torch\.nn\.modules\.linear\.Linear$"):
        bnfast.BatchNorm.from_torch(torch.nn.Linear(3, 3))


OTHER_MODULES = {
    "layer": ("LayerNorm", (6,), {"eps": 1e-3}, (4, 3, 6)),
    "layer of two axes": ("LayerNorm", ((3, 6),), {}, (4, 3, 6)),
    "layer, no bias": ("LayerNorm", (6,), {"bias": False}, (4, 3, 6)),
    "layer, plain": ("LayerNorm", (6,), {"elementwise_affine": False}, (4, 6)),
    "rms": ("RMSNorm", (6,), {"eps": 1e-3}, (4, 3, 6)),
    "rms, eps of the machine": ("RMSNorm", ((3, 6),), {}, (4, 3, 6)),
    "rms, plain": ("RMSNorm", (6,), {"elementwise_affine": False}, (4, 6)),
    "group": ("GroupNorm", (2, 6), {"eps": 1e-3}, (4, 6, 5)),
    "group, plain": ("GroupNorm", (3, 6), {"affine": False}, (4, 6, 5, 2)),
    "instance": ("InstanceNorm2d", (6,), {"eps": 1e-3}, (4, 6, 5, 2)),
    "instance, affine": ("InstanceNorm1d", (6,), {"affine": True}, (4, 6, 5)),
    "instance, tracked": (
        *("InstanceNorm3d", (6,)),
        *({"track_running_stats": True, "momentum": 0.3, "affine": True}, (4, 6, 5, 2, 3)),
    ),
    "instance, still": (
        *("InstanceNorm1d", (6,), {"track_running_stats": True, "momentum": None}, (4, 6, 5)),
    ),
}


def taken_by(name):
    """The layer of bnfast for a name in the tables of this file."""
    kind = name.split(",")[0].split()[0]
    names = {"layer": "LayerNorm", "rms": "RMSNorm", "group": "GroupNorm"}
    return getattr(bnfast, names.get(kind, "InstanceNorm"))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", OTHER_MODULES)
def test_other_layers_are_those_of_pytorch(torch, rng, dtype, name, training):
    kind, sizes, given, shape = OTHER_MODULES[name]
    make = getattr(torch.nn, kind)
    module = randomized(torch, make(*sizes, dtype=getattr(torch, dtype.name), **given))
    module.train(training)
    layer = taken_by(name).from_torch(module)
    assert layer.training is training
    x = data(rng, *shape, dtype=dtype, scale=0.03)
    tolerance = CLOSE if dtype == np.float32 else 1e-10
    for _ in range(2):
        theirs = torch.from_numpy(x).requires_grad_()
        y = module(theirs)
        agree(layer(x), numbers(y), dtype, tolerance)
    theirs_state = {name: numbers(tensor) for name, tensor in module.state_dict().items()}
    ours = layer.state_dict()
    assert list(ours) == list(theirs_state)
    for key, array in theirs_state.items():
        np.testing.assert_allclose(ours[key], array, rtol=CLOSE, atol=CLOSE)
    if training:
        y.sum().backward()
        layer.backward(np.ones_like(x))
        for key, parameter in module.named_parameters():
            gradient = getattr(layer, f"{key}_grad")
            np.testing.assert_allclose(
                gradient, numbers(parameter.grad), rtol=10 * CLOSE_F32, atol=10 * CLOSE_F32
            )


def test_running_statistics_that_instance_norm_no_longer_tracks_are_left_out(torch, rng):
    module = randomized(torch, torch.nn.InstanceNorm1d(3, track_running_stats=True)).eval()
    module.track_running_stats = False
    layer, x = bnfast.InstanceNorm.from_torch(module), data(rng, 4, 3, 5)
    agree(layer(x), numbers(module(torch.from_numpy(x))))


@pytest.mark.parametrize("ours", ["InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm"])
def test_each_layer_refuses_the_modules_of_others(torch, ours):
    other = torch.nn.BatchNorm2d(3)
    with pytest.raises(TypeError, match=r"of PyTorch, got an instance of torch\..*BatchNorm2d"):
        getattr(bnfast, ours).from_torch(other)
    with pytest.raises(TypeError, match="of Keras, or have the same attributes, got 3"):
        getattr(bnfast, ours).from_keras(3)


# Keras


def built(layer, shape, rng):
    """The layer, with weights that are not what they began as."""
    layer.build((None, *shape[1:]))
    layer.set_weights(
        [
            rng.uniform(0.1, 1.0, w.shape) * (SMALL_VARIANCE if "variance" in w.path else 1.0)
            for w in layer.weights
        ]
    )
    return layer


KERAS_BATCH_NORMS = {
    "defaults": ({}, (4, 5, 6, 3)),
    "resnet": ({"epsilon": 1.001e-5}, (4, 5, 6, 3)),
    "channels first": ({"axis": 1, "momentum": 0.5}, (4, 3, 5, 6)),
    "without scale": ({"scale": False}, (8, 3)),
    "without center": ({"center": False}, (8, 3)),
    "plain": ({"scale": False, "center": False}, (8, 3)),
    "frozen": ({"trainable": False}, (8, 3)),
    "float64": ({"dtype": "float64"}, (8, 3)),
    "mixed": ({"dtype": "mixed_float16"}, (8, 3)),
}


@pytest.mark.parametrize("name", KERAS_BATCH_NORMS)
def test_batch_norm_is_that_of_keras(keras, rng, name):
    given, shape = KERAS_BATCH_NORMS[name]
    theirs = built(keras.layers.BatchNormalization(**given), shape, rng)
    layer = bnfast.BatchNorm.from_keras(theirs)
    if name == "mixed":
        theirs.dtype_policy = "float32"
    dtype = np.dtype("float64" if name == "float64" else "float32")
    x = data(rng, *shape, dtype=dtype, scale=0.03)
    agree(layer(x), theirs(x, training=True), dtype)
    agree(layer.running_mean, theirs.moving_mean, dtype)
    agree(layer.running_var, theirs.moving_variance, dtype)
    agree(layer.eval()(x), theirs(x, training=False), dtype)


def test_keras_layers_that_cannot_be_taken_say_why(keras):
    class Own(keras.layers.BatchNormalization):
        def call(self, inputs, **others):
            return 2 * super().call(inputs, **others)

    take, layers = bnfast.BatchNorm.from_keras, keras.layers
    with pytest.raises(ValueError, match="BatchNormalization, which has none yet: call it on a"):
        take(layers.BatchNormalization())
    own, renorm = Own(), layers.BatchNormalization(renorm=True)
    other, plain = layers.LayerNormalization(), layers.BatchNormalization()
    for layer in (own, renorm, other, plain):
        layer.build((None, 3))
    with pytest.raises(TypeError, match="Own, which has a call of its own"):
        take(own)
    with pytest.raises(ValueError, match=r"renorm=False.*BatchRenorm is such"):
        take(renorm)
    with pytest.raises(TypeError, match="must be a BatchNormalization of Keras, got an instance"):
        take(other)
    with pytest.raises(TypeError, match="takes momentum and axis from the layer"):
        take(plain, momentum=0.5, axis=1)


OTHER_KERAS_LAYERS = {
    "layer": ("LayerNormalization", {}, (4, 3, 6)),
    "layer, over a list": ("LayerNormalization", {"axis": [3, 1], "epsilon": 1e-5}, (2, 4, 3, 6)),
    "layer, from the end": ("LayerNormalization", {"axis": [-1, -2]}, (2, 4, 3, 6)),
    "layer, first axes": ("LayerNormalization", {"axis": 1}, (4, 3, 6)),
    "layer, without scale": ("LayerNormalization", {"scale": False}, (4, 6)),
    "layer, without center": ("LayerNormalization", {"center": False}, (4, 6)),
    "layer, plain": ("LayerNormalization", {"scale": False, "center": False}, (4, 6)),
    "rms": ("RMSNormalization", {}, (4, 3, 6)),
    "rms, over a list": ("RMSNormalization", {"axis": [2, 1], "epsilon": 1e-3}, (4, 3, 6)),
    "group": ("GroupNormalization", {"groups": 2}, (4, 5, 6)),
    "group, channels first": ("GroupNormalization", {"groups": 3, "axis": 1}, (4, 6, 5, 2)),
    "group, without scale": ("GroupNormalization", {"groups": 2, "scale": False}, (4, 5, 6)),
    "group, plain": (
        *("GroupNormalization", {"groups": 2, "scale": False, "center": False}, (4, 5, 6)),
    ),
    "group, each": ("GroupNormalization", {"groups": -1}, (4, 5, 6)),
    "instance": ("GroupNormalization", {"groups": -1, "epsilon": 1e-5}, (4, 5, 2, 6)),
    "instance, channels first": ("GroupNormalization", {"groups": 6, "axis": 1}, (4, 6, 5)),
    "instance, without center": ("GroupNormalization", {"groups": -1, "center": False}, (4, 5, 6)),
}


@pytest.mark.parametrize("name", OTHER_KERAS_LAYERS)
def test_other_layers_are_those_of_keras(keras, rng, name):
    kind, given, shape = OTHER_KERAS_LAYERS[name]
    theirs = built(getattr(keras.layers, kind)(**given), shape, rng)
    layer = taken_by(name).from_keras(theirs)
    x = data(rng, *shape, scale=0.03)
    y = theirs(x)
    agree(layer(x), y)
    dy = np.ones_like(x)
    layer.backward(dy)
    assert (layer.bias_grad is None) == (layer.bias is None)
    if layer.bias is not None:
        assert layer.bias_grad.sum() == pytest.approx(x.size)


def test_an_accelerated_layer_of_keras_is_taken_and_a_patched_one_refused(keras, rng):
    if keras.config.backend() != "numpy":
        pytest.skip("bnfast accelerates Keras's NumPy backend alone")
    from bnfast.integrations.keras import accelerate

    layer = built(keras.layers.BatchNormalization(epsilon=1e-4), (2, 3), rng)
    accelerate(layer)
    assert bnfast.BatchNorm.from_keras(layer).eps == 1e-4
    layer.call = lambda x: 2 * x
    with pytest.raises(TypeError, match="BatchNormalization, which has a call of its own and may"):
        bnfast.BatchNorm.from_keras(layer)


def test_what_keras_computes_and_bnfast_does_not_is_refused(keras, rng):
    layers = keras.layers
    with pytest.warns(UserWarning, match="rms_scaling"):
        scaled = built(layers.LayerNormalization(rms_scaling=True), (2, 3), rng)
    with pytest.raises(ValueError, match=r"rms_scaling=False.* RMSNormalization of Keras is"):
        bnfast.LayerNorm.from_keras(scaled)
    for ours, theirs in ((bnfast.LayerNorm, "LayerNorm"), (bnfast.RMSNorm, "RMSNorm")):
        of_keras = built(getattr(layers, f"{theirs}alization")(epsilon=None), (2, 3), rng)
        with pytest.raises(TypeError, match=r"^layer\.epsilon must be a real number, got None"):
            ours.from_keras(of_keras)  # the epsilon of Keras's configuration
    mixed = built(layers.LayerNormalization(axis=[1, -1]), (2, 3, 4), rng)
    with pytest.raises(ValueError, match=r"layer\.axis must count all axes from the first one, or"):
        bnfast.LayerNorm.from_keras(mixed)
    for axis in (1, -2):
        inner = built(layers.RMSNormalization(axis=axis), (2, 3, 3), rng)
        with pytest.raises(ValueError, match=r"layer\.axis must name the last axes"):
            bnfast.RMSNorm.from_keras(inner)
    grouped = built(layers.GroupNormalization(groups=2), (2, 5, 4), rng)
    with pytest.raises(ValueError, match=r"number of channels, 4, got 2: bnfast\.Group"):
        bnfast.InstanceNorm.from_keras(grouped)


# Without a framework


def test_sizes_that_nothing_says_are_asked_for():
    plain = types.SimpleNamespace(axis=-1, epsilon=1e-3, gamma=None, beta=None)
    with pytest.raises(ValueError, match="must have a gamma or a beta, or be built for known"):
        bnfast.LayerNorm.from_keras(plain)
    plain.get_build_config = lambda: {"input_shape": (None, 5)}
    assert bnfast.LayerNorm.from_keras(plain).normalized_shape == (5,)
    plain.axis = []
    with pytest.raises(ValueError, match=r"layer\.axis must have at least one axis, got none"):
        bnfast.LayerNorm.from_keras(plain)


@pytest.mark.parametrize("ours", [bnfast.GroupNorm, bnfast.LayerNorm])
def test_parameters_have_the_dimensions_of_the_axes(ours):
    layer = types.SimpleNamespace(groups=1, axis=-1, epsilon=1e-3, gamma=[1.0, 2.0], beta=None)
    assert ours.from_keras(layer).weight.tolist() == [1.0, 2.0]
    layer.gamma = np.ones((4, 2))
    message = (
        r"^layer\.gamma must have a dimension for each of the axes \[-1\], got shape \(4, 2\)$"
    )
    with pytest.raises(ValueError, match=message):
        ours.from_keras(layer)


def torch_like(**others):
    """An object with the attributes of a batch norm of PyTorch."""
    given = {"num_features": 2, "eps": 1e-3, "momentum": 0.1, "training": True}
    given |= {"track_running_stats": True, "weight": np.ones(2), "bias": np.zeros(2)}
    given |= {"running_mean": np.zeros(2), "running_var": np.ones(2), "num_batches_tracked": 5}
    return types.SimpleNamespace(**(given | others))


def test_objects_with_the_attributes_are_taken():
    layer = bnfast.BatchNorm.from_torch(torch_like())
    assert (layer.eps, layer.num_batches_tracked, layer.dtype) == (1e-3, 5, np.float64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": np.ones(3)}, r"module\.weight must have one value for each of the 2 channels"),
        ({"bias": np.ones(2, int)}, r"module\.bias must be float16, bfloat16, float32 or float64"),
        ({"running_var": None}, r"module\.running_var must be an array of shape \(2,\), got None"),
        ({"num_batches_tracked": -1}, r"module\.num_batches_tracked must be at least 0"),
        ({"momentum": 2.0}, r"module\.momentum must be from 0 to 1"),
        ({"training": 1}, r"module\.training must be True or False"),
        ({"track_running_stats": "no"}, r"module\.track_running_stats must be True or False"),
        ({"num_features": "2"}, r"module\.num_features must be an integer"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_wrong_attributes_are_named(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        bnfast.BatchNorm.from_torch(torch_like(**wrong))


@pytest.mark.parametrize("value", [{}, None, np.ones(3), bnfast.BatchNorm(3)], ids=type)
def test_what_is_no_module_is_refused(value):
    with pytest.raises(TypeError, match=r"module must be a BatchNorm1d, .* got"):
        bnfast.BatchNorm.from_torch(value)


def test_the_classes_are_those_of_the_frameworks():
    for package, kinds in (("torch", PYTORCH_LAYERS), ("keras", KERAS_LAYERS)):
        framework = pytest.importorskip(package)
        names = {name for several in kinds.classes.values() for name in several}
        module = framework.nn if package == "torch" else framework.layers
        for name in names:
            cls = getattr(module, name)
            assert cls.__module__.startswith(kinds.homes) and hasattr(cls, kinds.method)
