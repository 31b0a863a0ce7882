"""Moving average batch normalization, and the centralized weights that it is for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _moving_average, _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float


class MovingAveraged(NamedTuple):
    """What `moving_average_batch_norm_backward` needs of the pass before it.

    Attributes
    ----------
    invrms, r : array (C,) of float64
        1 / sqrt(chi2 + eps), and the correction towards the running statistics.
    row : int
        The row of the buffers that is of this batch.
    averaged : bool
        Whether chi2 is the average over the buffer.
    """

    invrms: NDArray[np.float64]
    r: NDArray[np.float64]
    row: int
    averaged: bool


@in_default_float_mode
def moving_average_batch_norm(
    x: ArrayLikeOf[Float],
    running_var: ArrayLike,
    square_buffer: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.02,
    eps: float = 1e-5,
    *,
    row: int = 0,
    averaged: bool = True,
    r_max: float = 5.0,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Divide every channel of a batch by its root mean square over the last batches.

    For small batches. No mean is subtracted: the weights of the layer that makes `x` are to be
    centralized instead, with `weight_centralization`.

    Parameters
    ----------
    x : array of float32 or float64, at least 2-d
        The batch. Any strides; C channels along `axis`, M values in each.
    running_var : array (C,) of float32 or float64
        The exponential moving average of the mean square: updated in place in training, used as it
        is in evaluation.
    square_buffer : array (m, C) of float32 or float64, optional
        The mean squares of the last m batches: one row is written in training, which needs it.
    weight, bias : array (C,) of float32 or float64, optional
        gamma and beta; 1 and 0 where None.
    training : bool
        Normalize with the simple moving average, rather than with `running_var`.
    momentum : float
        The weight of the NEW batch in `running_var`.
    eps : float
        Added to the mean square: positive in training, not negative in evaluation.
    row : int
        The row that the batch replaces: the number of batches before it, modulo m.
    averaged : bool
        Use the average of the buffer; False for the first batches, which are normalized by their
        own mean square until the buffer is full.
    r_max : float
        How far a batch is corrected towards `running_var`: at least 1, which is not at all.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
    out : array like `x`, optional
        Where to write: `x` itself, or an array that shares no element with it.

    Returns
    -------
    array like `x`
        `out`, or a new array laid out like `x`. An empty batch gives an empty array and leaves the
        statistics alone.

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
    In training, with `running_var` as it was before the batch::

        square_buffer[row] = mean(x**2)
        chi2 = mean(square_buffer, axis=0)    where averaged, else mean(x**2)
        z    = x / sqrt(chi2 + eps)
        r    = clip(sqrt((chi2 + eps) / (running_var + eps)), 1 / r_max, r_max)
        y    = weight * r * z + bias
        running_var = (1 - momentum) * running_var + momentum * chi2

    in evaluation, ``y = weight * x / sqrt(running_var + eps) + bias``. The moving averages of the
    gradient's statistics stand in `moving_average_batch_norm_backward`. Two passes over `x`, one
    where it is neither averaged nor corrected, and no copy of it. Mean squares must be within the
    range of float64, and of the dtypes of the arrays that keep them.

    References
    ----------
    J. Yan, R. Wan, X. Zhang, W. Zhang, Y. Wei, J. Sun, 2020, "Towards Stabilizing Batch Statistics
    in Backward Propagation of Batch Normalization", arXiv:2001.06838, section 4.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> var, squares = np.ones(1), np.array([[7.0], [0.0]])
    >>> x = np.array([[1.0], [-7.0]])  # of mean square 25: with the batch before it, 16
    >>> bnfast.moving_average_batch_norm(x, var, squares, training=True, row=1, r_max=1).round(3)
    array([[ 0.25],
           [-1.75]])
    >>> squares, var
    (array([[ 7.],
           [25.]]), array([1.3]))
    """
    if _validation.flag("training", training):
        y, _ = _moving_average.normalize(
            *(x, running_var, square_buffer, weight, bias, momentum, eps),
            *(row, averaged, r_max, axis, out),
        )
        return y
    array, channel_axis, channels = _validation.batch("x", x, axis)
    _validation.full_precision("x", array)
    _validation.real("momentum", momentum)
    _validation.integer_from("row", row, 0)
    _validation.flag("averaged", averaged)
    _validation.factor_limit("r_max", r_max)
    zeros, reads = np.zeros(channels), {"square_buffer": square_buffer}
    return _primitives.scale_shift(
        array, channel_axis, zeros, running_var, weight, bias, eps, None, out, reads
    )


@in_default_float_mode
def moving_average_batch_norm_forward(
    x: ArrayLikeOf[Float],
    running_var: ArrayLike,
    square_buffer: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    momentum: float = 0.02,
    eps: float = 1e-5,
    *,
    row: int = 0,
    averaged: bool = True,
    r_max: float = 5.0,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], MovingAveraged]:
    """Divide a batch by its moving root mean square, and return what the backward pass needs.

    Parameters
    ----------
    x, running_var, square_buffer, weight, bias, momentum, eps, row, averaged, r_max, axis, out
        As in `moving_average_batch_norm` in training: `running_var` and one row of `square_buffer`
        are updated in place.

    Returns
    -------
    y : array like `x`
        The normalized batch.
    saved : MovingAveraged
        invrms = 1 / sqrt(chi2 + eps) and r, (C,) of float64, and the row.

    Raises
    ------
    TypeError, ValueError
        As `moving_average_batch_norm`.

    Notes
    -----
    The formulas stand in `moving_average_batch_norm`.

    References
    ----------
    J. Yan et al., 2020, arXiv:2001.06838, section 4.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [-7.0]])
    >>> y, saved = bnfast.moving_average_batch_norm_forward(
    ...     x, np.ones(1), np.array([[7.0], [0.0]]), row=1
    ... )
    >>> saved.invrms.round(3), saved.r.round(3)
    (array([0.25]), array([4.]))
    """
    y, saved = _moving_average.normalize(
        *(x, running_var, square_buffer, weight, bias, momentum, eps),
        *(row, averaged, r_max, axis, out),
    )
    return y, MovingAveraged(*saved)


@in_default_float_mode
def moving_average_batch_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    saved: MovingAveraged,
    gradient_buffer: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array]:
    """Return the gradients of moving average batch normalization, by moving averages of their own.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x : array of float32 or float64, at least 2-d
        The input of the forward pass.
    saved : MovingAveraged
        What the forward pass returned.
    gradient_buffer : array (m, C) of float32 or float64
        The statistics of the gradients of the last m batches, with as many rows as the
        `square_buffer` of the forward pass: the row of this batch is written.
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
    With z = x * invrms, g = weight * r * dy, and means and sums over all axes but `axis`::

        gradient_buffer[row] = mean(g * z)
        psi     = mean(gradient_buffer, axis=0)    where averaged, else mean(g * z)
        dx      = invrms * (g - z * psi)
        dweight = r * sum(dy * z)
        dbias   = sum(dy)

    This is the derivative of sum(dy * y) by x with r constant, where every batch of the buffer
    counts as what this one is: chi2 is taken as the mean square of `x` itself, and psi as its
    mean(g * z). Both are so for a buffer of one row, and where not averaged; otherwise the two
    averages stand for what a large batch would have, and dx is no derivative of anything that this
    batch makes.

    References
    ----------
    J. Yan et al., 2020, arXiv:2001.06838, section 4.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x, squares, products = np.array([[3.0], [4.0]]), np.zeros((1, 1)), np.zeros((1, 1))
    >>> y, saved = bnfast.moving_average_batch_norm_forward(x, np.ones(1), squares, r_max=1)
    >>> dy = np.array([[1.0], [0.0]])
    >>> dx, dweight, dbias = bnfast.moving_average_batch_norm_backward(dy, x, saved, products)
    >>> bool(abs((dx * x).sum()) < 1e-5)  # but for eps, y does not depend on the size of x
    True
    >>> dweight.round(4), products.round(4)
    (array([0.8485]), array([[0.4243]]))
    """
    passed = _validation.saved_value(saved, MovingAveraged, "moving_average_batch_norm_forward")
    return _moving_average.gradient(dy, x, passed, gradient_buffer, weight, axis, out)


@in_default_float_mode
def weight_centralization(
    w: ArrayLikeOf[Float], axis: int = 0, *, out: NDArray[Float] | None = None
) -> NDArray[Float]:
    """Subtract from every filter its mean.

    Parameters
    ----------
    w : array of float32 or float64, at least 2-d
        The weights of a linear or convolutional layer. Any strides.
    axis : int
        The axis of the filters: 0 for PyTorch's weights, -1 for Keras's.
    out : array like `w`, optional
        Where to write: `w` itself, or an array that shares no element with it.

    Returns
    -------
    array like `w`
        `out`, or a new array laid out like `w`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    ``y = w - mean(w)``, the mean over all axes but `axis`. What a layer with such weights makes of
    inputs of equal mean has a mean of 0, as `moving_average_batch_norm` takes it to have.

    References
    ----------
    J. Yan et al., 2020, arXiv:2001.06838, section 4.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bnfast.weight_centralization(np.array([[1.0, 3.0], [5.0, 9.0]]))
    array([[-1.,  1.],
           [-2.,  2.]])
    """
    y, _ = weight_centralization_forward(w, axis, out=out)
    return y


@in_default_float_mode
def weight_centralization_forward(
    w: ArrayLikeOf[Float], axis: int = 0, *, out: NDArray[Float] | None = None
) -> tuple[NDArray[Float], NDArray[np.float64]]:
    """Subtract from every filter its mean, and return the means.

    Parameters
    ----------
    w, axis, out
        As in `weight_centralization`.

    Returns
    -------
    y : array like `w`
        The centralized weights.
    mean : array of float64
        That of each filter. The backward pass does not need it.

    Raises
    ------
    TypeError, ValueError
        As `weight_centralization`.

    Notes
    -----
    The formula stands in `weight_centralization`.

    References
    ----------
    J. Yan et al., 2020, arXiv:2001.06838, section 4.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> y, mean = bnfast.weight_centralization_forward(np.array([[1.0, 3.0], [5.0, 9.0]]))
    >>> mean
    array([2., 7.])
    """
    return _centralized("w", w, axis, out)


@in_default_float_mode
def weight_centralization_backward(
    dy: ArrayLikeOf[Float], axis: int = 0, *, out: NDArray[Float] | None = None
) -> NDArray[Float]:
    """Return the gradient of weight centralization.

    Parameters
    ----------
    dy : array of float32 or float64, at least 2-d
        The gradient of the centralized weights.
    axis : int
        The axis of the filters.
    out : array like `dy`, optional
        Where to write dw: `dy` itself, or an array that shares no element with it.

    Returns
    -------
    array like `dy`
        dw: `out`, or a new array laid out like `dy`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    ``dw = dy - mean(dy)``, the mean over all axes but `axis`.

    References
    ----------
    J. Yan et al., 2020, arXiv:2001.06838, section 4.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bnfast.weight_centralization_backward(np.array([[1.0, 0.0]]))
    array([[ 0.5, -0.5]])
    """
    dw, _ = _centralized("dy", dy, axis, out)
    return dw


def _centralized(
    name: str, value: object, axis: object, out: object
) -> tuple[Array, NDArray[np.float64]]:
    array, filter_axis, filters = _validation.weights(name, value, axis)
    if out is not None:
        _validation.output(out, array, {name: value}, (name,))
    _, mean, low, *_ = _primitives.summarize(array, filter_axis, None, False, False)
    # What rounding left of the mean would cost float64 weights |mean| / std ulps.
    ones, rest = np.ones(filters), -low
    y = _primitives.scale_shift(array, filter_axis, mean, ones, None, rest, 0.0, None, out)
    return y, mean
