"""A short part of the fuzzer's cases, the same in every run; and the fuzzer sees what is wrong."""

import functools
import re

import numpy as np
import pytest

import bnfast
from bnfast import _core, functional
from fuzz import run
from fuzz.calls import CALLS
from fuzz.layers import LAYERS

# Of each function or layer, and kind.
CASES = 25


def numbers(kind, name, cases=CASES):
    first = run.SUBJECTS.index((kind, name))
    return [first + k * len(run.SUBJECTS) for k in range(cases)]


def reported(pattern, kind, name, cases=CASES):
    """Whether one of so many cases complains so; the first that does is the last that runs."""
    return any(
        re.search(pattern, text)
        for number in numbers(kind, name, cases)
        for text in run.run_case(number).complaints
    )


RARE = 40 * CASES


@pytest.mark.filterwarnings("ignore")  # a case looks at those of its calls
@pytest.mark.parametrize(("kind", "name"), run.SUBJECTS, ids=map(" of ".join, run.SUBJECTS))
def test_nothing_is_wrong(kind, name):
    for number in numbers(kind, name):
        outcome = run.run_case(number)
        assert not outcome.complaints, run.report(number, outcome)


def test_the_cases_are_of_all_functions_and_layers():
    functions = {name for name in functional.__all__ if name[0].islower()}
    assert set(CALLS) == functions
    layers = {name for name in bnfast.__all__ if hasattr(getattr(bnfast, name), "load_state_dict")}
    assert set(LAYERS) == layers


# The fuzzer must be able to fail: of each kind of error there is one


def replaced(monkeypatch, name, change):
    """Let a function do something wrong."""
    right = getattr(bnfast, name)

    @functools.wraps(right)
    def wrong(*arguments, **keywords):
        return change(right, *arguments, **keywords)

    monkeypatch.setattr(bnfast, name, wrong)


def test_a_wrong_value_is_reported(monkeypatch):
    def change(right, *arguments, **keywords):
        y = right(*arguments, **keywords)
        y *= 1 + 4e-6
        return y

    replaced(monkeypatch, "rms_norm", change)
    assert reported("allowed", "values", "rms_norm")


def test_a_result_of_16_bits_that_is_rounded_otherwise_is_reported(monkeypatch):
    def change(right, *arguments, **keywords):
        y = right(*arguments, **keywords)
        if y.dtype == np.float16:
            y[...] = np.nextafter(y, np.float16(1))
        return y

    replaced(monkeypatch, "rms_norm", change)
    assert reported("not that of float32 copies", "values", "rms_norm", 4 * CASES)


def test_a_wrong_gradient_is_reported(monkeypatch):
    def change(right, *arguments, **keywords):
        dx, dweight, dbias = right(*arguments, **keywords)
        return dx, dweight * (1 + 4e-6), dbias

    replaced(monkeypatch, "group_norm_backward", change)
    assert reported("dweight", "values", "group_norm_backward")


@pytest.mark.parametrize(
    "name", ["batch_norm_backward", "group_norm_backward", "layer_norm_backward"]
)
@pytest.mark.parametrize(
    ("argument", "wrong"),
    [("activation", "relu6"), ("negative_slope", 0.9), ("bias", None), ("residual", 0)],
)
def test_an_argument_of_an_activation_that_is_lost_is_reported(monkeypatch, name, argument, wrong):
    def change(right, *arguments, **keywords):
        good = keywords.get(argument)
        if argument == "residual" and isinstance(good, np.ndarray) and good.dtype.kind == "f":
            keywords[argument] = wrong * good
        elif argument != "residual" and good is not None:
            keywords[argument] = wrong
        return right(*arguments, **keywords)

    replaced(monkeypatch, name, change)
    assert reported("allowed", "values", name, 8 * CASES)


def forgets_the_mask(right, *arguments, mask=None, lengths=None, padding="zeros", **keywords):
    return right(*arguments, **keywords)


def forgets_the_padding(right, *arguments, padding="zeros", **keywords):
    return right(*arguments, **keywords)


def counts_one_more(right, *arguments, mask=None, lengths=None, **keywords):
    if isinstance(mask, np.ndarray) and mask.size and not mask.all():
        mask = mask.copy()
        mask[tuple(np.argwhere(~mask)[0])] = True
    return right(*arguments, mask=mask, lengths=lengths, **keywords)


def sums_otherwise_where_all_count(right, *arguments, mask=None, **keywords):
    *results, last = right(*arguments, mask=mask, **keywords)
    every = mask is not None and np.all(mask)
    return *results, np.nextafter(last, last.dtype.type(np.inf)) if every else last


def tells_of_padding(right, *arguments, **keywords):
    y, mean, invstd = right(*arguments, **keywords)
    x = arguments[0] if arguments else keywords["x"]
    return y, mean, invstd * (1 + 1e-15 * float(np.isnan(np.asarray(x, np.float64)).any()))


@pytest.mark.parametrize("name", ["batch_norm_forward", "group_norm_forward"])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (forgets_the_mask, "allowed|was not refused"),
        (forgets_the_padding, "y.* allowed"),
        (counts_one_more, "allowed"),
        (sums_otherwise_where_all_count, "other bits with a mask that lets all count"),
        (tells_of_padding, "other bits with other padding"),
    ],
)
def test_a_mask_that_is_taken_otherwise_is_reported(monkeypatch, name, change, complaint):
    replaced(monkeypatch, name, change)
    assert reported(complaint, "values", name, 10 * CASES)


@pytest.mark.parametrize("name", ["batch_norm_backward", "instance_norm_backward"])
@pytest.mark.parametrize("change", [forgets_the_mask, forgets_the_padding, counts_one_more])
def test_a_gradient_by_another_mask_is_reported(monkeypatch, name, change):
    replaced(monkeypatch, name, change)
    assert reported("allowed", "values", name, 10 * CASES)


def test_a_bad_mask_that_is_taken_is_reported(monkeypatch):
    def change(right, *arguments, mask=None, **keywords):
        if isinstance(mask, np.ndarray) and mask.dtype.kind in "if":
            mask = mask.astype(bool)
        return right(*arguments, mask=mask, **keywords)

    replaced(monkeypatch, "batch_norm", change)
    complaint = re.escape("was not refused: wrong is ('mask',)")
    assert reported(complaint, "wrong arguments", "batch_norm", 10 * CASES)


@pytest.mark.parametrize(
    ("form", "place"), [("jvp", 0), *(("double_backward", n) for n in range(3))]
)
def test_a_wrong_derivative_is_reported(monkeypatch, form, place):
    def change(right, *arguments, **keywords):
        found = right(*arguments, **keywords)
        for array in [found] if form == "jvp" else [found[place]]:
            array *= 1 + 1e-4
        return found

    name = f"group_norm_{form}"
    replaced(monkeypatch, name, change)
    wrong = "dy" if form == "jvp" else ("ddy", "dx", "dweight")[place]
    assert reported(rf"^{wrong}\[.* allowed", "values", name)


def test_wrong_statistics_of_a_window_are_reported(monkeypatch):
    def change(right, *arguments, **keywords):
        y, saved = right(*arguments, **keywords)
        return y, saved._replace(invstd=saved.invstd * (1 + 1e-5 * (saved.iterations > 1)))

    replaced(monkeypatch, "cross_iteration_batch_norm_forward", change)
    assert reported(r"invstd\[", "values", "cross_iteration_batch_norm_forward")


def test_other_bits_are_reported(monkeypatch):
    def change(right, *arguments, **keywords):
        y, mean, invstd = right(*arguments, **keywords)
        if _core.active_isa() != bnfast.available_isas()[0] or bnfast.get_num_threads() > 1:
            mean = np.nextafter(mean, np.inf)
        return y, mean, invstd

    replaced(monkeypatch, "batch_norm_forward", change)
    assert reported("has other bits", "values", "batch_norm_forward")


def test_a_leak_into_other_channels_is_reported(monkeypatch):
    def change(right, *arguments, **keywords):
        of = right(*arguments, **keywords)
        return bnfast.Moments(of.count, of.mean + 0 * of.mean.sum(), of.m2)

    replaced(monkeypatch, "moments", change)
    assert reported("changed others of result", "values", "moments", 2 * CASES)


def test_what_is_written_beside_out_is_reported(monkeypatch):
    def change(right, *arguments, out=None, **keywords):
        y = right(*arguments, out=out, **keywords)
        if out is not None and type(out.base) is np.ndarray and out.base.dtype == np.uint8:
            out.base[0] = 0
        return y

    replaced(monkeypatch, "instance_norm", change)
    assert reported("was written", "values", "instance_norm", 2 * CASES)


def test_a_call_that_writes_before_it_raises_is_reported(monkeypatch):
    def change(right, *arguments, out=None, **keywords):
        if isinstance(out, np.ndarray) and out.dtype.kind == "f" and out.flags.writeable:
            out[...] = 0
        return right(*arguments, out=out, **keywords)

    replaced(monkeypatch, "group_norm", change)
    assert reported("out was changed", "wrong arguments", "group_norm", 2 * CASES)


def test_an_error_that_does_not_name_the_argument_is_reported(monkeypatch):
    def change(right, *arguments, **keywords):
        try:
            return right(*arguments, **keywords)
        except (TypeError, ValueError) as error:
            raise ValueError("something is wrong") from error

    replaced(monkeypatch, "weight_norm", change)
    assert reported("names none of", "wrong arguments", "weight_norm")


@pytest.mark.filterwarnings("ignore")
def test_a_state_that_a_refused_call_changes_is_reported(monkeypatch):
    right = bnfast.GroupNorm.__call__

    def call(self, x, **keywords):
        self.weight *= 2
        y = right(self, x, **keywords)
        self.weight /= 2
        return y

    monkeypatch.setattr(bnfast.GroupNorm, "__call__", call)
    complaint = "was changed by something that is refused"
    assert reported(complaint, "sequences", "GroupNorm", 3 * CASES)


@pytest.mark.filterwarnings("ignore")
def test_running_statistics_that_are_off_are_reported(monkeypatch):
    right = bnfast.BatchNorm.__call__

    def call(self, x, **keywords):
        y = right(self, x, **keywords)
        if self.training and self.running_var is not None:
            self.running_var *= 1 + 1e-5
        return y

    monkeypatch.setattr(bnfast.BatchNorm, "__call__", call)
    assert reported("running_var", "sequences", "BatchNorm", 2 * CASES)


def wrong_call(monkeypatch, change):
    """Let batch norm do something else, told its arguments by name."""
    right = bnfast.BatchNorm.__call__

    def call(self, x, residual=None, **keywords):
        return change(right, self, x, residual, keywords)

    monkeypatch.setattr(bnfast.BatchNorm, "__call__", call)


def drops_recompute(right, layer, x, residual, keywords):
    return right(layer, x, residual, **{**keywords, "recompute": False})


def forgets_the_activation(right, layer, x, residual, keywords):
    y = right(layer, x, residual, **keywords)
    layer.activation = None
    return y


def overwrites_what_it_refuses(right, layer, x, residual, keywords):
    if layer.inplace and residual is not None and isinstance(x, np.ndarray) and x.size:
        x[...] = 0
    return right(layer, x, residual, **keywords)


def forgets_what_counts(right, layer, x, residual, keywords):
    return right(layer, x, residual, **{**keywords, "mask": None, "lengths": None})


def tracks_another_variance(right, layer, x, residual, keywords):
    y = right(layer, x, residual, **keywords)
    if keywords.get("mask") is not None and layer.training and layer.running_var is not None:
        layer.running_var *= 1 + 1e-5
    return y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (forgets_what_counts, r"y\[.* allowed"),
        (tracks_another_variance, r"running_var\[.* allowed"),
        (drops_recompute, "was changed by a call|num_batches_tracked is"),
        (forgets_the_activation, "activation was changed by a call"),
        (overwrites_what_it_refuses, "argument 0 was changed by a call that raised"),
    ],
)
def test_what_fused_layers_do_wrong_is_reported(monkeypatch, change, complaint):
    wrong_call(monkeypatch, change)
    assert reported(complaint, "sequences", "BatchNorm", 4 * CASES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["weight_grad", "bias_grad"])
def test_a_wrong_gradient_of_an_output_is_reported(monkeypatch, name):
    right = bnfast.BatchNorm.backward

    def backward(self, dy, **keywords):
        dx = right(self, dy, **keywords)
        if self.inplace and self.weight is not None:
            setattr(self, name, -getattr(self, name))
        return dx

    monkeypatch.setattr(bnfast.BatchNorm, "backward", backward)
    assert reported(name, "sequences", "BatchNorm", RARE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "method", "what"),
    [
        ("BatchNorm", "__call__", "y"),
        ("GhostBatchNorm", "__call__", "running_var"),
        ("GhostBatchNorm", "backward", "momentum_logit_grad"),
        ("ConditionalBatchNorm", "backward", "dx"),
    ],
)
def test_what_a_learned_momentum_does_wrong_is_reported(monkeypatch, name, method, what):
    right = getattr(getattr(bnfast, name), method)

    def wrong(self, *arguments, **keywords):
        result = right(self, *arguments, **keywords)
        array = getattr(self, what, result)
        learns = type(self.momentum) is bnfast.LearnableMomentum and self.num_batches_tracked > 1
        if learns and isinstance(array, np.ndarray) and array.dtype.itemsize > 2:
            array *= 1 + 1e-5
        return result

    monkeypatch.setattr(getattr(bnfast, name), method, wrong)
    assert reported(rf"^{what}\[.* allowed", "sequences", name, RARE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["y", "window_mean", "window_dmean", "window_dvar"])
def test_a_layer_whose_window_is_off_is_reported(monkeypatch, what):
    right = bnfast.CrossIterationBatchNorm.__call__

    def call(self, *arguments, **keywords):
        y = right(self, *arguments, **keywords)
        array = getattr(self, what, y)
        if self.training and self.num_batches_tracked > self.burn_in + 1:
            array *= 1 + 1e-5
        return y

    monkeypatch.setattr(bnfast.CrossIterationBatchNorm, "__call__", call)
    assert reported(rf"^{what}\[.* allowed", "sequences", "CrossIterationBatchNorm", RARE)


def test_the_command_repeats_a_case_and_says_what_is_wrong(monkeypatch, capsys):
    number = numbers("values", "layer_norm")[0]
    assert run.main(["--case", str(number)]) == 0
    assert "bnfast.layer_norm(" in capsys.readouterr().out
    replaced(monkeypatch, "layer_norm", lambda right, *arguments, **keywords: 0.0)
    assert run.main(["--case", str(number)]) == 1
    assert f"python tests/fuzz --case {number}" in capsys.readouterr().out
    assert run.main(["--seconds", "20", "--only", "layer_norm", "--failures", "1"]) == 1
    said = capsys.readouterr().out
    assert "WRONG: layer_norm" in said and "calls per second" in said
