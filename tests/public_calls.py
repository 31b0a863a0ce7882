"""A call of every public function, and of every layer, for what holds of all of them."""

import numpy as np

import bnfast


def arrays_of(result):
    """All numbers of what a function returned, as a list of arrays."""
    if isinstance(result, bnfast.Summary):
        extremes = [result.minimum, result.maximum, result.nonfinite]
        return [*arrays_of(bnfast.Moments(result.count, result.mean, result.m2)), *extremes]
    if isinstance(result, bnfast.Moments):
        return [result.mean, result.m2, result.var, result.std]
    if isinstance(result, (tuple, list)):
        return [array for part in result for array in arrays_of(part)]
    return [] if result is None else [np.asarray(result)]


def public_calls(x, dy, weight, bias):
    """Functions without arguments, by the name of the public function that they call.

    `x` and `dy` are (N, C, ...), `weight` and `bias` (C,). Each returns what `arrays_of` takes.
    """
    f = bnfast
    samples, channels, *inner = x.shape
    positive, selected = np.abs(weight), np.arange(x.size).reshape(x.shape) % 3 > 0
    of_positions = samples, 1, *inner
    counted = {"mask": np.arange(np.prod(of_positions)).reshape(of_positions) % 3 != 1}
    of_samples = np.outer(np.ones(samples, x.dtype), weight)
    of_filters = np.resize(positive, samples)
    of_elements = np.resize(weight, inner), np.resize(bias, inner)
    matrices = np.stack([np.diag(positive[: channels // 2]), np.diag(positive[channels // 2 :])])
    vectors = np.ones(samples, x.dtype), np.ones(x.size // samples, x.dtype)
    filters = np.outer(weight, np.ones(3, x.dtype))
    window = [
        bnfast.IterationStatistics(filters + entry, bias + entry, positive, filters, -filters)
        for entry in range(2)
    ]
    row, rows = {"row": 1}, np.stack([positive, positive + 1])
    saved = {
        name: getattr(f, f"{name}_forward")(x, *arguments, **keywords)[1:]
        for name, arguments, keywords in (
            ("batch_norm", (), {}),
            ("conditional_batch_norm", (None, None), {}),
            ("filter_response_norm", (), {}),
            ("instance_norm", (), {}),
            ("group_norm", (2,), {}),
            ("layer_norm", (inner,), {}),
            ("rms_norm", (inner,), {}),
            ("batch_renorm", (bias.copy(), positive.copy()), {}),
            ("ghost_batch_norm", (2,), {}),
            ("moving_average_batch_norm", (positive.copy(), rows.copy()), row),
            ("cross_iteration_batch_norm", (filters, window), {}),
            ("weight_norm", (of_filters,), {}),
            ("weight_standardization", (), {}),
            ("scaled_weight_standardization", (), {}),
            ("spectral_norm", vectors, {}),
            ("decorrelated_batch_norm", (), {"num_groups": 2}),
            ("iterative_norm", (), {"num_groups": 2}),
        )
    }

    def tracked(function, *before, variance=positive, **keywords):
        """Train, then evaluate with what was tracked."""
        running = bias.copy(), variance.copy()
        y = function(x, *before, *running, weight, bias, True, **keywords)
        return [y, *running, function(x, *before, *running, weight, bias, **keywords)]

    def forward_and_tracked():
        running = bias.copy(), positive.copy()
        tracks = {"running_mean": running[0], "running_var": running[1]}
        y = f.batch_norm_forward(x, weight, bias, activation="relu6", residual=dy)[0]
        masked = f.batch_norm_forward(x, weight, bias, **counted, padding="input")
        return [*f.batch_norm_forward(x, weight, bias, **tracks), *running, y, *masked]

    def conditional():
        running = bias.copy(), positive.copy()
        y = f.conditional_batch_norm(x, of_samples, -of_samples, *running, True)
        return [y, *running, f.conditional_batch_norm(x, of_samples, -of_samples, *running)]

    def renormalized():
        running = bias.copy(), positive.copy()
        return [*f.batch_renorm_forward(x, *running, weight, bias), *running]

    def averaged():
        state = positive.copy(), rows.copy()
        y = f.moving_average_batch_norm(x, *state, weight, bias, True, **row)
        return [y, *state, f.moving_average_batch_norm(x, *state, weight, bias)]

    def averaged_forward():
        state = positive.copy(), rows.copy()
        return [*f.moving_average_batch_norm_forward(x, *state, weight, bias, **row), *state]

    def averaged_backward():
        products, of_pass = rows.copy(), saved["moving_average_batch_norm"]
        found = f.moving_average_batch_norm_backward(dy, x, *of_pass, products, weight)
        return [*found, products]

    def across_iterations():
        running = bias.copy(), positive.copy()
        given = filters, window, weight, bias
        y = f.cross_iteration_batch_norm(x, *running, *given, True)
        return [y, *running, f.cross_iteration_batch_norm(x, *running, *given)]

    response = {"learned_eps": positive}
    fused = {"activation": "silu", "residual": dy}
    two = {"num_groups": 2}
    return {
        "batch_norm": lambda: [*tracked(f.batch_norm), *tracked(f.batch_norm, **fused)],
        "batch_norm_forward": forward_and_tracked,
        "batch_norm_backward": lambda: [
            *f.batch_norm_backward(dy, x, *saved["batch_norm"], weight),
            *f.batch_norm_backward(dy, x, *saved["batch_norm"], training=False),
            *f.batch_norm_backward(dy, x, *saved["batch_norm"], weight, bias=bias, **fused),
            *f.batch_norm_backward(dy, x, *saved["batch_norm"], weight, **counted),
        ],
        "batch_norm_backward_sums": lambda: f.batch_norm_backward_sums(dy, x, *saved["batch_norm"]),
        "batch_norm_backward_input": lambda: f.batch_norm_backward_input(
            dy, x, *saved["batch_norm"], weight, weight, bias, max(x.size // channels, 1)
        ),
        "batch_norm_jvp": lambda: f.batch_norm_jvp(dy, x, *saved["batch_norm"], weight),
        "batch_norm_double_backward": lambda: [
            f.batch_norm_double_backward(
                x, weight, bias, dy, x, *saved["batch_norm"], weight, training=training
            )
            for training in (True, False)
        ],
        "moments": lambda: [
            m := f.moments(x),
            m.merge(f.moments(dy)),
        ],
        "summary": lambda: [
            s := f.summary(x, where=selected),
            s + f.summary(dy, finite=True),
        ],
        "conditional_batch_norm": conditional,
        "conditional_batch_norm_forward": lambda: f.conditional_batch_norm_forward(
            x, of_samples, -of_samples
        ),
        "conditional_batch_norm_backward": lambda: f.conditional_batch_norm_backward(
            dy, x, *saved["conditional_batch_norm"], of_samples
        ),
        "filter_response_norm": lambda: f.filter_response_norm(x, weight, bias, bias, **response),
        "filter_response_norm_forward": lambda: f.filter_response_norm_forward(x, weight, bias),
        "filter_response_norm_backward": lambda: f.filter_response_norm_backward(
            dy, x, *saved["filter_response_norm"], weight, bias, bias, **response
        ),
        "instance_norm": lambda: f.instance_norm(
            x, bias.copy(), positive.copy(), weight, bias, True
        ),
        "instance_norm_forward": lambda: [
            *f.instance_norm_forward(x, weight, bias),
            *f.instance_norm_forward(x, weight, bias, **counted),
        ],
        "instance_norm_jvp": lambda: f.instance_norm_jvp(dy, x, *saved["instance_norm"], weight),
        "instance_norm_double_backward": lambda: f.instance_norm_double_backward(
            x, weight, bias, dy, x, *saved["instance_norm"], weight
        ),
        "instance_norm_backward": lambda: [
            *f.instance_norm_backward(dy, x, *saved["instance_norm"], weight),
            *f.instance_norm_backward(dy, x, *saved["instance_norm"], weight, **counted),
        ],
        "group_norm": lambda: f.group_norm(x, 2, weight, bias),
        "group_norm_forward": lambda: [
            *f.group_norm_forward(x, 2, weight, bias),
            *f.group_norm_forward(x, 2, weight, bias, activation="hardswish"),
            *f.group_norm_forward(x, 2, weight, bias, **counted),
        ],
        "group_norm_jvp": lambda: f.group_norm_jvp(dy, x, *saved["group_norm"], weight),
        "group_norm_double_backward": lambda: f.group_norm_double_backward(
            x, weight, bias, dy, x, *saved["group_norm"], weight
        ),
        "group_norm_backward": lambda: [
            *f.group_norm_backward(dy, x, *saved["group_norm"], weight),
            *f.group_norm_backward(dy, x, *saved["group_norm"], weight, **counted),
            *f.group_norm_backward(dy, x, *saved["group_norm"], weight[:2], per_group=True),
        ],
        "layer_norm": lambda: [
            f.layer_norm(x, channels, weight, bias, axis=1),
            f.layer_norm(x, channels, weight, bias, axis=1, **fused),
        ],
        "layer_norm_forward": lambda: [
            *f.layer_norm_forward(x, inner, *of_elements),
            *f.layer_norm_forward(x, inner, *of_elements, activation="relu6", residual=dy),
        ],
        "layer_norm_jvp": lambda: f.layer_norm_jvp(
            dy, x, inner, *saved["layer_norm"], of_elements[0]
        ),
        "layer_norm_double_backward": lambda: f.layer_norm_double_backward(
            x, *of_elements, dy, x, inner, *saved["layer_norm"], of_elements[0]
        ),
        "layer_norm_backward": lambda: [
            *f.layer_norm_backward(dy, x, inner, *saved["layer_norm"], of_elements[0]),
            *f.layer_norm_backward(
                *(dy, x, inner, *saved["layer_norm"], of_elements[0]), bias=of_elements[1], **fused
            ),
        ],
        "rms_norm": lambda: [
            f.rms_norm(x, channels, weight, axis=1),
            f.rms_norm(x, channels, weight, axis=1, **fused),
        ],
        "rms_norm_forward": lambda: f.rms_norm_forward(x, inner, of_elements[0]),
        "rms_norm_jvp": lambda: f.rms_norm_jvp(dy, x, inner, *saved["rms_norm"], of_elements[0]),
        "rms_norm_double_backward": lambda: f.rms_norm_double_backward(
            x, of_elements[1], dy, x, inner, *saved["rms_norm"], of_elements[0]
        ),
        "rms_norm_backward": lambda: [
            *f.rms_norm_backward(dy, x, inner, *saved["rms_norm"], of_elements[0]),
            *f.rms_norm_backward(dy, x, inner, *saved["rms_norm"], of_elements[0], **fused),
        ],
        "batch_renorm": lambda: tracked(f.batch_renorm),
        "batch_renorm_forward": renormalized,
        "batch_renorm_backward": lambda: f.batch_renorm_backward(
            dy, x, *saved["batch_renorm"], weight
        ),
        "ghost_batch_norm": lambda: tracked(f.ghost_batch_norm, 2),
        "ghost_batch_norm_forward": lambda: f.ghost_batch_norm_forward(x, 2, weight, bias),
        "ghost_batch_norm_backward": lambda: f.ghost_batch_norm_backward(
            dy, x, 2, *saved["ghost_batch_norm"], weight
        ),
        "moving_average_batch_norm": averaged,
        "moving_average_batch_norm_forward": averaged_forward,
        "moving_average_batch_norm_backward": averaged_backward,
        "cross_iteration_batch_norm": across_iterations,
        "cross_iteration_batch_norm_forward": lambda: f.cross_iteration_batch_norm_forward(
            x, filters, window, weight, bias
        ),
        "cross_iteration_batch_norm_backward": lambda: f.cross_iteration_batch_norm_backward(
            dy, x, *saved["cross_iteration_batch_norm"], weight
        ),
        "weight_centralization": lambda: f.weight_centralization(x),
        "weight_centralization_forward": lambda: f.weight_centralization_forward(x),
        "weight_centralization_backward": lambda: f.weight_centralization_backward(dy),
        "weight_norm": lambda: f.weight_norm(x, of_filters),
        "weight_norm_forward": lambda: f.weight_norm_forward(x, of_filters),
        "weight_norm_backward": lambda: f.weight_norm_backward(
            dy, x, of_filters, *saved["weight_norm"]
        ),
        "weight_standardization": lambda: f.weight_standardization(x, of_filters),
        "weight_standardization_forward": lambda: f.weight_standardization_forward(
            x, of_filters, eps_inside=False
        ),
        "weight_standardization_backward": lambda: f.weight_standardization_backward(
            dy, x, *saved["weight_standardization"], of_filters
        ),
        "scaled_weight_standardization": lambda: f.scaled_weight_standardization(x, of_filters),
        "scaled_weight_standardization_forward": lambda: f.scaled_weight_standardization_forward(
            x, of_filters, floor=False
        ),
        "scaled_weight_standardization_backward": lambda: f.scaled_weight_standardization_backward(
            dy, x, *saved["scaled_weight_standardization"], of_filters
        ),
        "spectral_norm": lambda: f.spectral_norm(x, *[vector.copy() for vector in vectors]),
        "spectral_norm_forward": lambda: f.spectral_norm_forward(x, *vectors, 2),
        "spectral_norm_backward": lambda: f.spectral_norm_backward(dy, x, *saved["spectral_norm"]),
        "decorrelated_batch_norm": lambda: tracked(
            f.decorrelated_batch_norm, variance=matrices, **two
        ),
        "decorrelated_batch_norm_forward": lambda: f.decorrelated_batch_norm_forward(
            x, weight, bias, **two
        ),
        "decorrelated_batch_norm_backward": lambda: f.decorrelated_batch_norm_backward(
            dy, x, *saved["decorrelated_batch_norm"], weight
        ),
        "iterative_norm": lambda: tracked(f.iterative_norm, variance=matrices, **two),
        "iterative_norm_forward": lambda: f.iterative_norm_forward(x, weight, bias, **two),
        "iterative_norm_backward": lambda: f.iterative_norm_backward(
            dy, x, *saved["iterative_norm"], weight
        ),
    }
