"""What batches weigh in running statistics: averages, what is learned, skipped and frozen."""

import copy
import pickle

import numpy as np
import pytest

import bnfast
from bnfast import CumulativeAverage, ExponentialAverage, LearnableMomentum
from bnfast.running_averages import weight_of_new_batch
from cases import in_layout
from oracle import central_differences, close
from test_running_statistics import AVERAGING, CHANNELS, LAYERS, call
from tolerances import CLOSE_F64, FINITE_DIFFERENCES

POLICIES = {
    "weight of the new": ExponentialAverage(new=0.3),
    "weight of the old": ExponentialAverage(old=0.7),
    "bias-corrected": ExponentialAverage(new=0.3, bias_corrected=True),
    "cumulative": CumulativeAverage(),
    "schedule": lambda number: 1.0 / (number + 1),
}
LEARNING = {
    "batch": bnfast.BatchNorm,
    "ghost": lambda channels, **k: bnfast.GhostBatchNorm(channels, 3, **k),
    "conditional": lambda channels, **k: bnfast.ConditionalBatchNorm(channels, 2, **k),
}


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


@pytest.fixture(params=LEARNING)
def learning(request):
    return LEARNING[request.param]


@pytest.fixture(params=POLICIES)
def policy(request):
    return POLICIES[request.param]


def running(layer):
    return {name: a for name, a in layer.state_dict().items() if name.startswith("running")}


def batches(rng, count=4, samples=3, dtype=np.float64):
    """Of one ghost each, with means and variances of their own."""
    return [rng.normal(k, k + 1, (samples, CHANNELS, 4)).astype(dtype) for k in range(count)]


def statistics_of(kind, x):
    """Those of one batch."""
    layer = LAYERS[kind](CHANNELS, momentum=1.0, dtype=np.float64)
    call(layer, x)
    return running(layer)


def blended(kind, data, weights):
    """The running statistics, by the formula."""
    statistics = running(LAYERS[kind](CHANNELS, dtype=np.float64))
    for x, weight in zip(data, weights, strict=True):
        of_batch = statistics_of(kind, x)
        statistics = {
            name: (1 - weight) * old + weight * of_batch[name] for name, old in statistics.items()
        }
    return statistics


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        size = np.abs(array).max()
        np.testing.assert_allclose(found[name], array, rtol=CLOSE_F64, atol=CLOSE_F64 * size)


def assert_same_state(layer, other):
    np.testing.assert_equal(layer.state_dict(), other.state_dict())


def test_both_conventions_are_the_number_that_pytorch_means(kind, dtype, rng):
    momenta = 0.25, ExponentialAverage(new=0.25), ExponentialAverage(old=0.75)
    layers = [LAYERS[kind](CHANNELS, momentum=momentum, dtype=dtype) for momentum in momenta]
    for x in batches(rng, dtype=dtype):
        outputs = [call(layer, x) for layer in layers]
        np.testing.assert_array_equal(outputs[1], outputs[0])
    for layer in layers[1:]:
        np.testing.assert_equal(running(layer), running(layers[0]))


def test_the_weight_of_a_new_batch():
    assert weight_of_new_batch(0.1, 1) == weight_of_new_batch(0.1, 5) == 0.1
    assert [weight_of_new_batch(None, n) for n in (1, 2, 4)] == [1.0, 0.5, 0.25]
    assert weight_of_new_batch(lambda n: n / 8, 2) == 0.25


@pytest.mark.parametrize("kind", AVERAGING)
def test_the_cumulative_average_is_momentum_none(kind, dtype, rng):
    layer, other = (
        LAYERS[kind](CHANNELS, momentum=momentum, dtype=dtype)
        for momentum in (None, CumulativeAverage())
    )
    for x in batches(rng, dtype=dtype):
        call(layer, x)
        call(other, x)
    assert_same_state(layer, other)


def test_every_policy_blends_by_its_weights(kind, policy, rng):
    layer, data = LAYERS[kind](CHANNELS, momentum=policy, dtype=np.float64), batches(rng)
    for x in data:
        call(layer, x)
    assert_close(running(layer), blended(kind, data, [policy(k) for k in range(1, 5)]))
    assert layer.num_batches_tracked == 4


def test_the_bias_corrected_average_is_that_of_adam(kind, rng):
    a, data = 0.2, batches(rng)
    policy = ExponentialAverage(new=a, bias_corrected=True)
    layer, sums = LAYERS[kind](CHANNELS, momentum=policy, dtype=np.float64), {}
    for step, x in enumerate(data, 1):
        call(layer, x)
        for name, array in statistics_of(kind, x).items():
            sums[name] = (1 - a) * sums.get(name, 0.0) + a * array
        corrected = {name: array / (1 - (1 - a) ** step) for name, array in sums.items()}
        assert_close(running(layer), corrected)


@pytest.mark.parametrize(
    ("weight", "number", "expected"),
    [(1.0, 5, 1.0), (1e-12, 4, 0.25), (0.5, 10**6, 0.5), (0.9, 1, 1.0)],
)
def test_bias_corrected_weights_at_their_limits(weight, number, expected):
    policy = ExponentialAverage(new=weight, bias_corrected=True)
    assert policy(number) == pytest.approx(expected, rel=1e-11)


def test_the_bias_corrected_weight_of_a_first_batch_is_1(rng):
    for weight in rng.uniform(size=300):  # some round to more without care
        assert ExponentialAverage(new=weight, bias_corrected=True)(1) <= 1.0


def test_a_schedule_is_asked_for_each_batch_once(kind, rng):
    asked = []

    def schedule(number):
        asked.append(number)
        return np.float32(0.5)

    layer = LAYERS[kind](CHANNELS, momentum=schedule, dtype=np.float64)
    for x in batches(rng, 3):
        call(layer, x)
    call(layer.eval(), x)
    assert asked == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("all", TypeError, r"momentum\(1\) must be a real number, got 'all'"),
        (np.nan, ValueError, r"momentum\(1\) must be finite"),
        (2, ValueError, r"momentum\(1\) must be from 0 to 1, got 2.0"),
        (-1e-9, ValueError, r"momentum\(1\) must be from 0 to 1"),
    ],
)
def test_what_a_schedule_must_not_return_leaves_the_layer_alone(kind, rng, value, error, message):
    layer = LAYERS[kind](CHANNELS, momentum=lambda _: value)
    before = layer.state_dict()
    with pytest.raises(error, match=message):
        call(layer, batches(rng)[0])
    np.testing.assert_equal(layer.state_dict(), before)


@pytest.mark.parametrize("momentum", [2.0, -1])
def test_a_momentum_that_was_set_later_is_checked(kind, rng, momentum):
    layer = LAYERS[kind](CHANNELS)
    layer.momentum = momentum
    before = layer.state_dict()
    with pytest.raises(ValueError, match="momentum must be from 0 to 1"):
        call(layer, batches(rng)[0])
    np.testing.assert_equal(layer.state_dict(), before)


def test_a_state_goes_on_where_it_was_saved(kind, policy, dtype, rng):
    data = batches(rng, 6, dtype=dtype)
    straight, first, second = (
        LAYERS[kind](CHANNELS, momentum=policy, dtype=dtype) for _ in range(3)
    )
    for number, x in enumerate(data):
        call(straight, x)
        if number == 3:
            second.load_state_dict(first.state_dict())
            first = second
        call(first, x)
    assert_same_state(first, straight)


def test_reset_statistics_begin_their_policy_again(kind, policy, rng):
    layer, fresh = (LAYERS[kind](CHANNELS, momentum=policy) for _ in range(2))
    for x in batches(rng, dtype=np.float32):
        call(layer, x)
    layer.reset_running_stats()
    for x in batches(rng, 2, dtype=np.float32):
        call(layer, x)
        call(fresh, x)
    assert_same_state(layer, fresh)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (ExponentialAverage, TypeError, "either new or old must be given"),
        (lambda: ExponentialAverage(new=0.1, old=0.9), TypeError, "either new or old"),
        (lambda: ExponentialAverage(new="x"), TypeError, "new must be a real number"),
        (lambda: ExponentialAverage(old=np.inf), ValueError, "old must be finite"),
        (
            lambda: ExponentialAverage(old=1, bias_corrected=True),
            *(ValueError, "above 0 to be bias-corrected"),
        ),
        (
            lambda: ExponentialAverage(new=0.1, bias_corrected=1),
            *(TypeError, "bias_corrected must be True or False"),
        ),
        (lambda: ExponentialAverage(new=1.5), ValueError, "new must be from 0 to 1, got 1.5"),
        (lambda: ExponentialAverage(old=-0.1), ValueError, "old must be from 0 to 1, got -0.1"),
        (lambda: ExponentialAverage(0.1), TypeError, "by name, new= of the new batch or old= of"),
        (lambda: LearnableMomentum(1.0), ValueError, "initial must be between 0 and 1"),
        (lambda: LearnableMomentum(per_channel=0), TypeError, "per_channel must be True or"),
        (lambda: bnfast.BatchNorm(3, momentum="x"), TypeError, "momentum must be a real number"),
        (
            lambda: bnfast.BatchNorm(3, momentum=LearnableMomentum(), track_running_stats=False),
            *(ValueError, "momentum is learned only with track_running_stats=True"),
        ),
        *(
            (lambda make=make: make(3, momentum=CumulativeAverage), TypeError, "got the class C")
            for make in (bnfast.BatchNorm, bnfast.BatchRenorm, bnfast.IterNorm)
        ),
        *(
            (lambda momentum=momentum: bnfast.BatchNorm(3, momentum=momentum), ValueError, "0 to 1")
            for momentum in (-1, -1e-9, 1 + 1e-9, 2)
        ),
        (lambda: bnfast.BatchNorm(3, nonfinite="no"), ValueError, "nonfinite must be 'propagate'"),
        *(
            (lambda make=make: make(3, momentum=None), TypeError, "momentum must be a real number")
            for make in (bnfast.BatchRenorm, bnfast.MovingAverageBatchNorm)
        ),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Batches that are not finite

BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("value", BAD)
def test_skipped_batches_leave_nothing(kind, dtype, rng, value):
    layer, other = (
        LAYERS[kind](CHANNELS, nonfinite=choice, dtype=dtype) for choice in ("skip", "propagate")
    )
    for x in batches(rng, dtype=dtype):
        call(layer, x)
        call(other, x)
        x[1, 2, 0] = value
        before = layer.state_dict()
        spoiled, reference = call(layer, x), copy.deepcopy(other)
        np.testing.assert_equal(layer.state_dict(), before)
        np.testing.assert_array_equal(spoiled, call(reference, x))  # the output is as ever
    assert_same_state(layer, other)


@pytest.mark.parametrize("value", BAD)
def test_batches_that_are_refused_write_nothing(kind, dtype, rng, value):
    layer = LAYERS[kind](CHANNELS, nonfinite="raise", dtype=dtype)
    x = batches(rng, dtype=dtype)[0]
    call(layer, x)
    before, out = layer.state_dict(), np.full_like(x, 7)
    x[1, 2, 0] = value
    more = ([0, 1, 0],) if kind == "conditional" else ()
    with pytest.raises(ValueError, match=r"x must have finite statistics.* 1 of 9 .* channel 2"):
        layer(x, *more, out=out)
    np.testing.assert_equal(layer.state_dict(), before)
    np.testing.assert_array_equal(out, 7)
    assert call(layer.eval(), x).shape == x.shape  # evaluation takes anything


@pytest.mark.parametrize("value", BAD)
def test_skipped_batches_leave_buffers_and_windows(dtype, rng, value):
    """As if they had never been, also once they are used, and also by their gradients."""
    filters = rng.normal(size=(CHANNELS, 2))
    layers, others = (
        (
            bnfast.MovingAverageBatchNorm(CHANNELS, 2, warm_up=0, dtype=dtype, **options),
            bnfast.CrossIterationBatchNorm((CHANNELS, 2), 3, dtype=dtype, **options),
        )
        for options in ({"nonfinite": "skip"}, {})
    )
    for inputs in rng.normal(size=(7, 6, 2)):
        x = (inputs @ filters.T).astype(dtype)
        bad = x.copy()
        bad[2, 0] = value
        for layer, other in zip(layers, others, strict=True):
            more = (inputs, filters) if layer is layers[1] else ()
            np.testing.assert_array_equal(layer(x, *more), other(x, *more))
            np.testing.assert_array_equal(layer.backward(x), other.backward(x))
            before, reference = layer.state_dict(), copy.deepcopy(other)
            np.testing.assert_array_equal(layer(bad, *more), reference(bad, *more))
            np.testing.assert_array_equal(layer.backward(x), reference.backward(x))
            np.testing.assert_equal(layer.state_dict(), before)
        filters = filters + 0.01
    assert all(layer.num_batches_tracked == 7 for layer in layers)


def test_a_mean_square_that_is_not_finite_is_skipped(rng):
    x = rng.normal(1e200, 1, (6, CHANNELS))
    layer = bnfast.MovingAverageBatchNorm(CHANNELS, nonfinite="skip", dtype=np.float64)
    before = layer.state_dict()
    layer(x)
    np.testing.assert_equal(layer.state_dict(), before)


@pytest.mark.parametrize("choice", ["skip", "raise"])
def test_what_is_not_tracked_is_checked_as_ever(rng, choice):
    layer = bnfast.MovingAverageBatchNorm(CHANNELS, 2, nonfinite=choice, dtype=np.float64)
    x = rng.normal(size=(2, CHANNELS))
    layer.square_buffer = np.zeros_like(x)
    x[0, 0] = np.nan if choice == "skip" else 1.0
    with pytest.raises(ValueError, match="out must not share memory with square_buffer"):
        layer(x, out=layer.square_buffer)
    assert not layer.square_buffer.any()


def test_single_ghosts_are_skipped(rng):
    policy = CumulativeAverage()
    x = rng.normal(size=(8, CHANNELS, 4))
    x[4, 1, 1] = np.nan
    layer = bnfast.GhostBatchNorm(CHANNELS, 3, momentum=policy, nonfinite="skip")
    alone = bnfast.BatchNorm(CHANNELS, momentum=policy)
    layer(x)
    for part in (x[:3], x[6:]):
        alone(part)
    assert_same_state(layer, alone)


def test_finite_batches_are_neither_skipped_nor_refused(kind, dtype, rng):
    layers = [
        LAYERS[kind](CHANNELS, nonfinite=choice, dtype=dtype)
        for choice in ("propagate", "skip", "raise")
    ]
    for x in (*batches(rng, dtype=dtype), np.empty((0, CHANNELS, 4), dtype)):
        for layer in layers:
            call(layer, x)
    for layer in layers[1:]:
        assert_same_state(layer, layers[0])


# Frozen


def test_a_frozen_layer_trains_as_it_evaluates(kind, dtype, rng):
    frozen, other = (LAYERS[kind](CHANNELS, dtype=dtype, **k) for k in ({"frozen": True}, {}))
    for x in batches(rng, dtype=dtype):
        call(other, x)
    frozen.load_state_dict(other.state_dict())
    before, dy = frozen.state_dict(), rng.normal(size=x.shape).astype(dtype)
    assert frozen.training
    np.testing.assert_array_equal(call(frozen, x), call(other.eval(), x))
    np.testing.assert_array_equal(frozen.backward(dy), other.backward(dy))
    for name in ("weight_grad", "bias_grad"):
        np.testing.assert_array_equal(getattr(frozen, name), getattr(other, name))
    if frozen.weight is not None:
        assert np.any(frozen.weight_grad)
    np.testing.assert_equal(frozen.state_dict(), before)
    frozen.frozen = False
    call(frozen, x)
    assert all(np.any(array != before[name]) for name, array in running(frozen).items())


def test_frozen_layers_read_neither_windows_nor_buffers(dtype, rng):
    x = rng.normal(size=(6, CHANNELS)).astype(dtype)
    for layer in (
        bnfast.CrossIterationBatchNorm((CHANNELS, 2), 3, dtype=dtype, frozen=True),
        bnfast.MovingAverageBatchNorm(CHANNELS, 2, warm_up=0, dtype=dtype, frozen=True),
    ):
        before = layer.state_dict()
        layer(x)
        close(layer.backward(x), x / np.sqrt(1 + layer.eps), dtype)
        np.testing.assert_equal(layer.state_dict(), before)


def test_representations_tell_what_is_not_as_usual():
    plain = repr(bnfast.BatchNorm(3))
    assert "frozen" not in plain and "nonfinite" not in plain
    layer = bnfast.BatchNorm(3, momentum=CumulativeAverage(), frozen=True, nonfinite="skip")
    assert "momentum=CumulativeAverage()" in repr(layer)
    assert repr(layer).endswith("frozen=True, nonfinite=skip)")


def test_pickles_without_the_newer_attributes_are_as_before(kind, rng):
    layer = LAYERS[kind](CHANNELS)
    old = copy.deepcopy(layer)
    del old.__dict__["frozen"], old.__dict__["nonfinite"]
    loaded = pickle.loads(pickle.dumps(old))
    x = batches(rng)[0]
    np.testing.assert_array_equal(call(loaded, x), call(layer, x))
    assert_same_state(loaded, layer)
    assert repr(loaded) == repr(layer)


# Learned momentum


def made(make, rng, per_channel=True, first=True, **options):
    """A layer with random parameters that has seen a batch, unless its first is to come."""
    momentum = LearnableMomentum(0.3, per_channel)
    layer = make(3, momentum=momentum, dtype=np.float64, **options)
    layer.weight[...] = rng.uniform(0.5, 2, layer.weight.shape)
    layer.bias[...] = rng.normal(size=layer.bias.shape)
    layer.momentum_logit[...] = rng.normal(size=layer.momentum_logit.shape)
    if first:
        call(layer, in_layout(rng.normal(1, 2, (5, 3, 4)), options.get("axis", 1)))
    return layer


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["blended", "first batch"])
def test_gradients_through_a_learned_momentum(learning, axis, rng, per_channel, unbiased, first):
    layer = made(learning, rng, per_channel, first, axis=axis, unbiased=unbiased)
    # Of one ghost: what a part leaves for the next is a constant to the gradient.
    x, dy = (in_layout(rng.normal(2, 3, (3, 3, 4)), axis) for _ in range(2))
    dy /= 10
    as_it_was = copy.deepcopy(layer)
    call(layer, x)
    gradients = layer.backward(dy), layer.weight_grad, layer.bias_grad, layer.momentum_logit_grad

    def loss():
        return (call(copy.deepcopy(as_it_was), x) * dy).sum()

    arrays = x, as_it_was.weight, as_it_was.bias, as_it_was.momentum_logit
    for array, gradient in zip(arrays, gradients, strict=True):
        numeric = central_differences(loss, array)
        assert gradient.shape == array.shape
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)
    assert np.all((layer.momentum_logit_grad != 0) == first)


@pytest.mark.parametrize("momentum", [LearnableMomentum(0.3), LearnableMomentum(0.3, True)])
def test_ghosts_with_a_learned_momentum_are_batches_one_after_the_other(dtype, axis, rng, momentum):
    options = {"momentum": momentum, "axis": axis, "dtype": dtype}
    layer, alone = bnfast.GhostBatchNorm(4, 3, **options), bnfast.BatchNorm(4, **options)
    x, dy = (in_layout(rng.normal(2, 3, (8, 4, 5)), axis).astype(dtype) for _ in range(2))
    y, dx = layer(x), layer.backward(dy)
    sums = 0
    for start in (0, 3, 6):
        part = slice(start, start + 3)
        np.testing.assert_array_equal(y[part], alone(x[part]))
        np.testing.assert_array_equal(dx[part], alone.backward(dy[part]))
        sums = sums + alone.momentum_logit_grad
    assert_same_state(layer, alone)
    close(layer.momentum_logit_grad, sums, dtype)


def test_the_loss_sees_what_evaluation_will_see(learning, dtype, rng):
    layer = learning(3, momentum=LearnableMomentum(0.2), dtype=dtype)
    data = rng.normal(3, 2, (3, 3, 3, 4)).astype(dtype)
    outputs = [call(layer, x) for x in data]
    close(outputs[-1], call(layer.eval(), data[-1]), dtype)
    assert layer.num_batches_tracked == 3


def test_a_learned_momentum_near_1_is_batch_normalization(rng):
    layer = bnfast.BatchNorm(3, momentum=LearnableMomentum(0.5), unbiased=False, dtype=np.float64)
    plain = bnfast.BatchNorm(3, momentum=1.0, unbiased=False, dtype=np.float64)
    layer.momentum_logit[...] = 800.0
    for x in rng.normal(3, 2, (3, 5, 3, 4)):
        close(layer(x), plain(x))
        close(layer.backward(x), plain.backward(x))
        close(layer.running_var, plain.running_var)
    assert layer.momentum_logit_grad == 0


def test_a_learned_momentum_near_0_leaves_the_statistics_as_they_are(learning, rng):
    layer = made(learning, rng)
    layer.momentum_logit[...] = -800.0
    before = running(layer)
    call(layer, rng.normal(3, 2, (3, 3, 4)))
    np.testing.assert_equal(running(layer), before)


@pytest.mark.parametrize("what", ["evaluation", "frozen"])
def test_statistics_that_stay_give_a_learned_momentum_no_gradient(learning, rng, what):
    layer = made(learning, rng)
    layer.training, layer.frozen = what != "evaluation", what == "frozen"
    x = rng.normal(size=(3, 3, 4))
    call(layer, x)
    layer.backward(x)
    np.testing.assert_array_equal(layer.momentum_logit_grad, np.zeros(3))
    assert np.any(layer.weight_grad)


def test_a_first_batch_forgets_statistics_that_are_not_finite(learning, rng):
    layer, fresh = (made(learning, np.random.default_rng(0), first=False) for _ in range(2))
    layer.running_mean[...], layer.running_var[...] = np.nan, np.inf
    x = rng.normal(size=(3, 3, 4))
    np.testing.assert_array_equal(call(layer, x), call(fresh, x))
    np.testing.assert_array_equal(layer.backward(x), fresh.backward(x))
    np.testing.assert_array_equal(layer.momentum_logit_grad, 0)
    assert_same_state(layer, fresh)


def test_an_empty_batch_counts_for_nothing(learning, dtype):
    layer = learning(3, momentum=LearnableMomentum(), dtype=dtype)
    before, x = layer.state_dict(), np.empty((0, 3, 4), dtype)
    assert call(layer, x).shape == x.shape
    assert layer.backward(x).shape == x.shape
    np.testing.assert_array_equal(layer.momentum_logit_grad, 0)
    np.testing.assert_equal(layer.state_dict(), before)


def test_states_with_and_without_a_learned_momentum(learning, rng):
    layer = made(learning, rng)
    saved = layer.state_dict()
    assert list(saved)[-2:] == ["momentum_logit", "num_batches_tracked"]
    other = learning(3, momentum=LearnableMomentum(per_channel=True), dtype=np.float64)
    other.load_state_dict(saved)
    x = rng.normal(size=(3, 3, 4))
    np.testing.assert_array_equal(call(other, x), call(layer, x))
    plain = learning(3, dtype=np.float64)
    assert "momentum_logit" not in plain.state_dict()
    before = layer.momentum_logit.copy()
    layer.load_state_dict(plain.state_dict())  # as PyTorch's
    np.testing.assert_array_equal(layer.momentum_logit, before)
    with pytest.raises(ValueError, match=r"unexpected \['momentum_logit'\]"):
        plain.load_state_dict(saved)


@pytest.mark.parametrize("kind", [name for name in LAYERS if name not in LEARNING])
def test_layers_that_cannot_learn_their_momentum_say_so(kind):
    with pytest.raises(TypeError, match="momentum can be a LearnableMomentum of BatchNorm"):
        LAYERS[kind](CHANNELS, momentum=LearnableMomentum())


@pytest.mark.parametrize("which", ["out", "one value", "x as gradient", "no logit"])
def test_calls_that_a_learned_momentum_refuses_write_nothing(learning, rng, which):
    layer = made(learning, rng)
    before, x = layer.state_dict(), rng.normal(size=(3, 3, 4))
    more = ([0, 1, 0],) if isinstance(layer, bnfast.ConditionalBatchNorm) else ()
    kept, out = x.copy(), np.full_like(x, 7)
    if which == "out":
        with pytest.raises(ValueError, match="out must not share memory with running_mean"):
            layer.running_mean = out[0, :, 0]
            layer.running_mean[...] = before["running_mean"]
            layer(x, *more, out=out)
    elif which == "one value":
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer(x[:1, :, :1], *more[:1] and ([0],), out=out[:1, :, :1])
    elif which == "x as gradient":
        layer(x, *more)
        before = layer.state_dict()
        with pytest.raises(ValueError, match="x, which a learned momentum reads once more"):
            layer.backward(x.copy(), out=x)
    else:
        layer.momentum_logit = None
        before.pop("momentum_logit")
        with pytest.raises(TypeError, match="momentum_logit must be"):
            layer(x, *more, out=out)
    np.testing.assert_equal(layer.state_dict(), before)
    np.testing.assert_array_equal(x, kept)


def test_skipped_batches_leave_a_learned_momentum_alone(learning, rng):
    layer = made(learning, rng, nonfinite="skip")
    before, x = layer.state_dict(), rng.normal(size=(4, 3, 4))
    x[0, 0, 0] = np.nan
    assert np.isfinite(call(layer, x)[:, 1:]).all()
    layer.backward(np.ones_like(x))
    np.testing.assert_array_equal(layer.momentum_logit_grad, 0)
    np.testing.assert_equal(layer.state_dict(), before)
