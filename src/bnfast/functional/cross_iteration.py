"""Cross-iteration batch normalization: what it means, its defaults, its documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _filter_derivatives, _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float


class IterationStatistics(NamedTuple):
    """What cross-iteration batch normalization keeps of an iteration for the next ones.

    Attributes
    ----------
    filters : array (C, ...)
        The weights that made the batch: of the linear layer or convolution before it.
    mean, var : array (C,)
        mu and the variance of the batch, as it was.
    dmean, dvar : array like `filters`
        Their derivatives by the weights: of a channel, by those of its own filter.

    Notes
    -----
    For a channel x = P w of a batch, a row of P for each of its M values::

        dmean = mean(P)                       over the rows
        dvar  = 2 / M * P.T @ (x - mean)

    The paper keeps the mean square, nu = var + mean**2, and its derivative; a large mean leaves
    nothing of the variance there. See `cross_iteration_batch_norm`.

    References
    ----------
    Z. Yao, Y. Cao, S. Zheng, G. Huang, S. Lin, 2021, "Cross-Iteration Batch Normalization",
    arXiv:2002.05712, section 3.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> inputs, filters = np.array([[1.0, 0.0], [3.0, 2.0]]), np.array([[1.0, -1.0]])
    >>> found = bnfast.IterationStatistics.of(inputs @ filters.T, inputs, filters)
    >>> found.mean, found.dmean
    (array([1.]), array([[2., 1.]]))
    """

    filters: Array
    mean: Array
    var: Array
    dmean: Array
    dvar: Array

    @classmethod
    @in_default_float_mode
    def of(
        cls,
        x: ArrayLikeOf[Float],
        inputs: ArrayLike,
        filters: ArrayLike,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        axis: int = 1,
    ) -> IterationStatistics:
        """Return those of a batch that a linear layer or a convolution has made.

        Parameters
        ----------
        x : array (N, C, ...) of float32 or float64, at least 2-d
            The batch, its samples along axis 0 and its channels along `axis`.
        inputs : array (N, K, ...) of float32 or float64
            What the layer made it of, its channels along `axis` as well.
        filters : array (C, K / groups) or (C, K / groups, ...) of float32 or float64
            The weights of a linear layer, which may be applied at every position, or those of a
            convolution (a cross-correlation, as in PyTorch). Copied.
        stride, padding, dilation : int, or one for each spatial axis
            Those of the convolution; padded with zeros.
        groups : int
            The groups of the convolution.
        axis : int
            The channel axis: 1 for NCHW, -1 for NHWC; not 0.

        Returns
        -------
        IterationStatistics
            Of float64, but for the filters. Of an empty batch, all are 0.

        Raises
        ------
        TypeError, ValueError
            For an argument of the wrong type, dtype, shape or value.

        Notes
        -----
        As many multiplications as for two gradients of the layer's weights, by NumPy's BLAS, in
        float64, which decides the last bits; pieces of `x` and `inputs` are copied, of 2 MiB or a
        sixteenth of their positions. A bias of the layer does not matter as long as it stays the
        same.
        """
        array, _ = _validation.channel_axis_of_samples(x, axis)
        _validation.full_precision("x", array)
        channel_axis = _validation.integer("axis", axis) % max(array.ndim, 1)
        sources = _validation.floating_array("inputs", inputs)
        weights = _validation.floating_array("filters", filters)
        layer = _filter_derivatives.convolution(
            *(array, channel_axis, sources, weights, stride, padding, dilation, groups)
        )
        count, mean, m2 = _primitives.moments(array, channel_axis)
        found = np.zeros(weights.shape), np.zeros(weights.shape)
        if count > 0 and weights.size > 0:
            with np.errstate(all="ignore"):
                found = _filter_derivatives.derivatives(
                    *(array, channel_axis, mean, sources, weights, layer)
                )
        return cls(weights.copy(), mean, m2 / max(count, 1), *found)


class CrossIterated(NamedTuple):
    """What `cross_iteration_batch_norm_backward` needs of the pass before it.

    Attributes
    ----------
    mean, invstd : array (C,) of float64
        mu and 1 / sqrt(var + eps), averaged over the iterations.
    iterations : int
        k, how many iterations these are, with this one.
    batch_mean, batch_var : array (C,) of float64
        The statistics of the batch alone.
    """

    mean: NDArray[np.float64]
    invstd: NDArray[np.float64]
    iterations: int
    batch_mean: NDArray[np.float64]
    batch_var: NDArray[np.float64]


@in_default_float_mode
def cross_iteration_batch_norm(
    x: ArrayLikeOf[Float],
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    filters: ArrayLike | None = None,
    window: Sequence[IterationStatistics] = (),
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    unbiased: bool = True,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Normalize a batch by the statistics of the last iterations, as they would be now.

    For small batches: those of earlier iterations, which were made with other weights, are
    compensated for that by a Taylor polynomial of the first degree in the weights.

    Parameters
    ----------
    x : array of float32 or float64, at least 2-d
        The batch. Any strides; C channels along `axis`, M values in each.
    running_mean, running_var : array (C,) of float32 or float64, or None
        In training they are updated in place, with the statistics of `x` alone, or both None; in
        evaluation they are what `x` is normalized with, and required.
    filters : array (C, ...) of float32 or float64, optional
        The weights that made `x`, of the linear layer or convolution before; needed where there is
        a window.
    window : sequence of IterationStatistics
        Of the iterations before this one; none of `x`. Empty, the default, this is batch norm.
    weight, bias : array (C,) of float32 or float64, optional
        gamma and beta; 1 and 0 where None.
    training : bool
        Normalize with the statistics of `x` and the window, rather than the running ones.
    momentum : float
        The weight of the NEW batch in the running statistics.
    eps : float
        Added to the variance: positive in training, not negative in evaluation.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
    unbiased : bool
        Give running_var the variance divided by M - 1 rather than by M.
    out : array like `x`, optional
        Where to write: `x` itself, or an array that shares no element with it.

    Returns
    -------
    array like `x`
        `out`, or a new array laid out like `x`. An empty batch gives an empty array and leaves the
        running statistics alone.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Warns
    -----
    RuntimeWarning
        As `batch_norm`.

    Notes
    -----
    In training, with the sums of a filter's products and D = filters - entry.filters::

        mu[0], nu[0] = mean(x), mean(x**2)
        mu[t] = entry.mean + sum(entry.dmean * D)      for each entry of the window
        nu[t] = entry.nu   + sum(entry.dnu * D)        where nu = var + mean**2
        mu    = mean(mu[t])                            over k = 1 + len(window) iterations
        var   = mean(max(nu[t], mu[t]**2)) - mu**2
        y     = weight * (x - mu) / sqrt(var + eps) + bias

    which is computed from variances, without the cancellation::

        var[t] = max(entry.var + sum(entry.dvar * D) - sum(entry.dmean * D)**2, 0)
        var    = mean(var[t]) + mean((mu[t] - mu)**2)

    The authors' code leaves out the iterations whose nu[t] is less than mu[t]**2, and divides by
    sqrt(var) + eps by default; this is the paper's. Two passes over `x`, one without a window, and
    no copy of it.

    References
    ----------
    Z. Yao, Y. Cao, S. Zheng, G. Huang, S. Lin, 2021, "Cross-Iteration Batch Normalization",
    arXiv:2002.05712, section 3.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> inputs = np.array([[1.0], [3.0]])
    >>> before, now = np.array([[1.0]]), np.array([[1.5]])
    >>> window = [bnfast.IterationStatistics.of(inputs @ before.T, inputs, before)]
    >>> y = bnfast.cross_iteration_batch_norm(
    ...     inputs @ now.T, np.zeros(1), np.ones(1), now, window, training=True
    ... )
    >>> y.round(2)  # of a mean of 3 in both iterations, and variances of 2.25 and 1
    array([[-1.18],
           [ 1.18]])
    """
    correction = 1.0 if _validation.flag("unbiased", unbiased) else 0.0
    new = _validation.real("momentum", momentum)
    array, channel_axis, channels = _validation.batch("x", x, axis)
    _validation.full_precision("x", array)
    if not _validation.flag("training", training):
        _checked_window(filters, window, channels)
        return _primitives.scale_shift(
            *(array, channel_axis, running_mean, running_var, weight, bias, eps, None, out),
            _reads(filters, window),
        )
    tracked = _validation.running_statistics(running_mean, running_var, array, channels)
    count = array.size // max(channels, 1)
    if tracked is not None and array.size > 0:
        _validation.enough_values("x", array, count, "channel", unbiased=correction == 1.0)
    running = {"running_mean": running_mean, "running_var": running_var}
    y, saved = _normalize(array, channel_axis, filters, window, weight, bias, eps, out, running)
    if tracked is not None and array.size > 0:
        divided = saved.batch_mean, saved.batch_var * count
        _primitives.update_running(tracked, new, *divided, count - correction)
    return y


@in_default_float_mode
def cross_iteration_batch_norm_forward(
    x: ArrayLikeOf[Float],
    filters: ArrayLike | None = None,
    window: Sequence[IterationStatistics] = (),
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], CrossIterated]:
    """Normalize a batch by the statistics of the last iterations, and return what backward needs.

    Parameters
    ----------
    x, filters, window, weight, bias, eps, axis, out
        As in `cross_iteration_batch_norm` in training.

    Returns
    -------
    y : array like `x`
        The normalized batch.
    saved : CrossIterated
        mean = mu and invstd = 1 / sqrt(var + eps), the number of iterations k, and the statistics
        of `x` alone: batch_mean and batch_var.

    Raises
    ------
    TypeError, ValueError
        As `cross_iteration_batch_norm`.

    Notes
    -----
    The formulas stand in `cross_iteration_batch_norm`. Before the next iteration, the window gets
    the statistics of this one, and loses its oldest.

    References
    ----------
    Z. Yao et al., 2021, arXiv:2002.05712, section 3.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> rng, window = np.random.default_rng(0), []
    >>> filters = rng.normal(size=(3, 5))
    >>> for _ in range(6):
    ...     inputs = rng.normal(size=(4, 5))
    ...     x = inputs @ filters.T
    ...     y, saved = bnfast.cross_iteration_batch_norm_forward(x, filters, window)
    ...     window = [bnfast.IterationStatistics.of(x, inputs, filters), *window][:3]
    ...     filters = filters + 0.01
    >>> saved.iterations
    4
    """
    array, channel_axis, _ = _validation.batch("x", x, axis)
    _validation.full_precision("x", array)
    return _normalize(array, channel_axis, filters, window, weight, bias, eps, out, {})


@in_default_float_mode
def cross_iteration_batch_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    saved: CrossIterated,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array]:
    """Return the gradients of cross-iteration batch normalization.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x : array of float32 or float64, at least 2-d
        The input of the forward pass.
    saved : CrossIterated
        What the forward pass returned.
    weight : array (C,) of float32 or float64, optional
        gamma; 1 where None.
    axis : int
        The channel axis.
    out : array like `x`, optional
        Where to write dx: `dy` or `x` itself, or an array that shares no element with either.

    Returns
    -------
    dx : array like `x`
        The gradient of the input.
    dweight, dbias : array (C,)
        The gradients of weight and bias, of the dtype of `weight`, or of `x` where it is None.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    This is the derivative of sum(dy * y) by `x` where the compensated statistics of the iterations
    of the window, mu[t] and nu[t], are constants: it goes through the statistics of `x` alone, a
    share of 1 / k of the averages. With xhat = (x - mean) * invstd, and sums over all axes but
    `axis`::

        dbias   = sum(dy)
        dweight = sum(dy * xhat)
        dx      = weight * invstd * (dy - dbias / (k * M) - xhat * dweight / (k * M))

    The weights of the layer before get their gradient through `x`, not through the compensation.

    References
    ----------
    Z. Yao et al., 2021, arXiv:2002.05712, section 3.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, saved = bnfast.cross_iteration_batch_norm_forward(x)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dweight, dbias = bnfast.cross_iteration_batch_norm_backward(dy, x, saved)
    >>> dbias
    array([1.])
    """
    of = _validation.saved_value(saved, CrossIterated, "cross_iteration_batch_norm_forward")
    number = _validation.integer_from("iterations", of.iterations, 1)
    if number == 1:
        return _primitives.gradient(dy, x, axis, of.mean, of.invstd, weight, False, out)
    part = _primitives.PartOfGradient(dy, x, axis, of.mean, None, of.invstd, weight, out)
    count = number * (part.x.size // max(part.channels, 1))
    dx = part.input_gradient(max(count, 1), part.sums)
    dweight, dbias = part.parameter_gradients()
    return dx, dweight, dbias


def _normalize(
    x: Array,
    axis: int,
    filters: object,
    window: Sequence[IterationStatistics],
    weight: object,
    bias: object,
    eps: object,
    out: object,
    running: Mapping[str, object],
) -> tuple[Array, CrossIterated]:
    """Return y, and what the backward pass needs, of a checked x and axis.

    `out` must share no memory with what is `running`.
    """
    channels = x.shape[axis] if x.ndim > 1 else 0
    epsilon = _validation.epsilon(eps, training=True)
    current, entries = _checked_window(filters, window, channels)
    reads = _reads(filters, window) | dict(running)
    if not entries or x.size == 0:
        m2 = np.zeros(channels)
        y, mean, invstd = _primitives.normalize(
            x, axis, weight, bias, epsilon, out=out, m2=m2, reads=reads
        )
        var = m2 / max(x.size // max(channels, 1), 1)
        return y, CrossIterated(mean, invstd, 1 + len(entries), mean, var)
    count, mean, m2 = _primitives.moments(x, axis)
    with np.errstate(all="ignore"):
        compensated = [_compensated(current, entry) for entry in entries]
        means = np.stack([mean, *[each_mean for each_mean, _ in compensated]])
        variances = np.stack([m2 / count, *[each_var for _, each_var in compensated]])
        centre, var = average_of_iterations(means, variances)
        invstd = 1.0 / np.sqrt(var + epsilon)
    y = _primitives.scale_shift(x, axis, centre, var, weight, bias, epsilon, None, out, reads)
    return y, CrossIterated(centre, invstd, len(means), mean, m2 / count)


def average_of_iterations(means: Array, variances: Array) -> tuple[Array, Array]:
    """Return the mean and the variance of iterations, (k, C) each, of as many values each."""
    centre = means[0] + (means - means[0]).sum(0) / len(means)
    return centre, (variances.sum(0) + ((means - centre) ** 2).sum(0)) / len(means)


def _reads(filters: object, window: Sequence[IterationStatistics]) -> dict[str, object]:
    """Return what `out` must share no memory with, by name."""
    of_window = {
        f"window[{place}].{name}": array
        for place, entry in enumerate(window)
        for name, array in entry._asdict().items()
    }
    return {"filters": filters, **of_window}


def _compensated(filters: Array, entry: IterationStatistics) -> tuple[Array, Array]:
    """Return the mean and the variance that an iteration would have with these filters."""
    moved = (filters.astype(np.float64) - entry.filters).reshape(len(filters), -1)
    shift = (entry.dmean.reshape(moved.shape) * moved).sum(1)
    var = entry.var + (entry.dvar.reshape(moved.shape) * moved).sum(1) - shift**2
    return entry.mean + shift, np.maximum(var, 0.0)


def _checked_window(
    filters: object, window: object, channels: int
) -> tuple[Array, list[IterationStatistics]]:
    """Return the filters, or an empty array without a window, and its entries."""
    if not isinstance(window, Sequence) or isinstance(window, IterationStatistics):
        raise TypeError(
            f"window must be a sequence of IterationStatistics, got {type(window).__name__}"
        )
    if not window and filters is None:
        return np.empty(0), []
    current = _validation.floating_array("filters", filters)
    if current.ndim < 2 or len(current) != channels:
        raise ValueError(
            f"filters must have at least 2 dimensions, and one filter for each of the {channels} "
            f"channels of x, got shape {current.shape}"
        )
    entries = []
    for place, entry in enumerate(window):
        name = f"window[{place}]"
        _validation.instance(name, entry, IterationStatistics)
        of_filters = [
            _validation.shaped(f"{name}.{field}", getattr(entry, field), current.shape)
            for field in ("filters", "dmean", "dvar")
        ]
        of_channels = [
            _validation.required_channel_parameter(
                f"{name}.{field}", getattr(entry, field), channels
            )
            for field in ("mean", "var")
        ]
        old, dmean, dvar = of_filters
        mean, var = of_channels
        entries.append(IterationStatistics(old, mean, var, dmean, dvar))
    return current, entries
