"""Normalizations that whiten: channels are not only scaled, but made uncorrelated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _validation, _whitening
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast._whitening import WHITENING, Statistics


class Whitened(NamedTuple):
    """What `decorrelated_batch_norm_backward` needs of the pass before it, of float64.

    Parameters
    ----------
    mean : array (C,)
        mu.
    matrix : array (G, C / G, C / G)
        W of each group.
    eigenvalues : array (G, C / G), optional
        Of Sigma, eps included, in ascending order; for constant statistics they are not needed.
    eigenvectors : array (G, C / G, C / G), optional
        In columns, in the same order.
    """

    mean: NDArray[np.float64]
    matrix: NDArray[np.float64]
    eigenvalues: NDArray[np.float64] | None = None
    eigenvectors: NDArray[np.float64] | None = None

    @classmethod
    @in_default_float_mode
    def of_covariance(cls, mean: ArrayLike, covariance: ArrayLike, eps: float = 1e-5) -> Whitened:
        """Return what whitens data of this mean and covariance.

        Parameters
        ----------
        mean : array (C,) of float32 or float64
        covariance : array (G, C / G, C / G) of float32 or float64
            Of each group, without eps.
        eps : float
            Added to the diagonal; not negative.

        Returns
        -------
        Whitened

        Raises
        ------
        TypeError, ValueError
            For an argument of the wrong type, dtype, shape or value.

        Notes
        -----
        ``W = D diag(1 / sqrt(max(l, 0) + eps)) D.T``, with the eigenvalues l and the eigenvectors D
        of the symmetric part of `covariance`. A group with NaN or infinity has NaN for its matrix.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> covariance = np.array([[[4.0, 0.0], [0.0, 1.0]]])
        >>> bnfast.Whitened.of_covariance(np.zeros(2), covariance, eps=0.0).matrix
        array([[[0.5, 0. ],
                [0. , 1. ]]])
        """
        centre, matrices = _mean_and_covariance(mean, covariance)
        epsilon = _validation.epsilon(eps, training=False)
        # NaN in one group may be an error in the LAPACK, which would be one for all groups.
        known = np.asarray(np.isfinite(matrices).all((1, 2), keepdims=True))
        eigenvalues, vectors = np.linalg.eigh(np.where(known, matrices, np.eye(matrices.shape[1])))
        with np.errstate(all="ignore"):
            # Negative ones are rounding, which may be larger than eps.
            shifted = np.where(known[..., 0], np.maximum(eigenvalues, 0.0) + epsilon, np.nan)
            roots = vectors * shifted[:, None, :] ** -0.25
            return cls(centre, roots @ roots.swapaxes(1, 2), shifted, vectors)

    @in_default_float_mode
    def covariance_gradient(self, dmatrix: ArrayLike) -> NDArray[np.float64]:
        """Return the gradient of the covariance for one of the matrix.

        Parameters
        ----------
        dmatrix : array (G, C / G, C / G) of float32 or float64

        Returns
        -------
        array (G, C / G, C / G) of float64

        Raises
        ------
        TypeError, ValueError
            If eigenvalues or eigenvectors are missing or of the wrong shape.

        Notes
        -----
        ``D (P * (D.T dW D)) D.T``, with ``P_ij = -1 / (r_i r_j (r_i + r_j))`` of the roots r of the
        eigenvalues, and * by elements. Equal eigenvalues are nothing special.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> saved = bnfast.Whitened.of_covariance(np.zeros(2), np.eye(2)[None], eps=0.0)
        >>> saved.covariance_gradient(np.eye(2)[None])
        array([[[-0.5,  0. ],
                [ 0. , -0.5]]])
        """
        shape = self.matrix.shape
        eigenvalues = _validation.saved_statistic("eigenvalues", self.eigenvalues, shape[:2])
        vectors = _validation.saved_statistic("eigenvectors", self.eigenvectors, shape)
        upstream = _validation.shaped("dmatrix", dmatrix, shape).astype(np.float64)
        with np.errstate(all="ignore"):
            root = np.sqrt(eigenvalues)
            one, other = root[:, :, None], root[:, None, :]
            inner = -(vectors.swapaxes(1, 2) @ upstream @ vectors) / (one * other * (one + other))
            gradient: NDArray[np.float64] = vectors @ inner @ vectors.swapaxes(1, 2)
        return gradient


class IterativelyWhitened(NamedTuple):
    """What `iterative_norm_backward` needs of the pass before it, of float64.

    Parameters
    ----------
    mean : array (C,)
        mu.
    matrix : array (G, C / G, C / G)
        W of each group.
    covariance : array (G, C / G, C / G), optional
        Sigma, eps included; for constant statistics it is not needed.
    iterations : int
        T.
    """

    mean: NDArray[np.float64]
    matrix: NDArray[np.float64]
    covariance: NDArray[np.float64] | None = None
    iterations: int = 5

    @classmethod
    @in_default_float_mode
    def of_covariance(
        cls, mean: ArrayLike, covariance: ArrayLike, eps: float = 1e-5, iterations: int = 5
    ) -> IterativelyWhitened:
        """Return what nearly whitens data of this mean and covariance.

        Parameters
        ----------
        mean : array (C,) of float32 or float64
        covariance : array (G, C / G, C / G) of float32 or float64
            Of each group, without eps.
        eps : float
            Added to the diagonal; not negative.
        iterations : int
            T, at least 1.

        Returns
        -------
        IterativelyWhitened

        Raises
        ------
        TypeError, ValueError
            For an argument of the wrong type, dtype, shape or value.

        Notes
        -----
        The formula stands in `iterative_norm`; of `covariance` the symmetric part is taken. A group
        with NaN or infinity has NaN for its matrix.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> covariance = np.array([[[4.0, 0.0], [0.0, 1.0]]])
        >>> saved = bnfast.IterativelyWhitened.of_covariance(np.zeros(2), covariance, 0.0, 2)
        >>> saved.matrix.round(3)
        array([[[0.5  , 0.   ],
                [0.   , 0.816]]])
        """
        centre, matrices = _mean_and_covariance(mean, covariance)
        epsilon = _validation.epsilon(eps, training=False)
        steps = _validation.integer_from("iterations", iterations, 1)
        shifted = matrices + epsilon * np.eye(matrices.shape[1])
        with np.errstate(all="ignore"):
            trace, iterates = _newton_schulz(shifted, steps)
            return cls(centre, iterates[-1][0] / np.sqrt(trace), shifted, steps)

    @in_default_float_mode
    def covariance_gradient(self, dmatrix: ArrayLike) -> NDArray[np.float64]:
        """Return the gradient of the covariance for one of the matrix.

        Parameters
        ----------
        dmatrix : array (G, C / G, C / G) of float32 or float64

        Returns
        -------
        array (G, C / G, C / G) of float64

        Raises
        ------
        TypeError, ValueError
            If the covariance is missing or of the wrong shape, or there are no iterations.

        Notes
        -----
        The iterations of `iterative_norm` backwards: from dP = sqrt(r) dW and dQ = 0, with
        P = P_(k-1) and Q = Q_(k-1), for k = T to 1::

            dM = -1/2 (dP P.T + Q.T dQ)
            dP, dQ = (3/2 I - 1/2 P Q).T dP + dM Q.T, dQ (3/2 I - 1/2 P Q).T + P.T dM

        and then, with dS = dQ::

            dSigma = r (dS - (<dS, S> + 1/2 <dW, W>) I)

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> saved = bnfast.IterativelyWhitened.of_covariance(np.zeros(1), np.ones((1, 1, 1)), 0.0)
        >>> saved.covariance_gradient(np.ones((1, 1, 1)))
        array([[[-0.5]]])
        """
        shape = self.matrix.shape
        covariance = _validation.saved_statistic("covariance", self.covariance, shape)
        steps = _validation.integer_from("iterations", self.iterations, 1)
        upstream = _validation.shaped("dmatrix", dmatrix, shape).astype(np.float64)
        with np.errstate(all="ignore"):
            trace, iterates = _newton_schulz(covariance.astype(np.float64), steps)
            of_root = upstream / np.sqrt(trace)
            of_scaled = np.zeros(shape)
            for root, scaled in reversed(iterates[:-1]):
                turned, turned_scaled = root.swapaxes(1, 2), scaled.swapaxes(1, 2)
                shrinking = _shrinking(root, scaled).swapaxes(1, 2)
                between = -0.5 * (of_root @ turned + turned_scaled @ of_scaled)
                of_root, of_scaled = (
                    shrinking @ of_root + between @ turned_scaled,
                    of_scaled @ shrinking + turned @ between,
                )
            along = of_scaled * iterates[0][1] + 0.5 * upstream * self.matrix
            of_trace = along.sum((1, 2), keepdims=True) * np.eye(shape[1])
            gradient: NDArray[np.float64] = (of_scaled - of_trace) / trace
        return gradient


@in_default_float_mode
def decorrelated_batch_norm(
    x: ArrayLikeOf[Float],
    running_mean: ArrayLike | None = None,
    running_matrix: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    num_groups: int = 1,
    averaged: str = WHITENING,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Whiten a batch: channels of a group get the mean 0, the variance 1, and no correlation.

    Parameters
    ----------
    x : array of float32 or float64, at least 2-d
        The batch. Any strides; C channels along `axis`, M values in each.
    running_mean : array (C,) of float32 or float64, or None
        In training it is updated in place, or None as is `running_matrix`; in evaluation it is what
        `x` is whitened with, and required.
    running_matrix : array (G, C / G, C / G) of float32 or float64, or None
        Likewise; what it is, `averaged` says.
    weight, bias : array (C,) of float32 or float64, optional
        gamma and beta; 1 and 0 where None.
    training : bool
        Whiten with the statistics of `x` itself rather than the running ones.
    momentum : float
        The weight of the NEW batch in the running statistics.
    eps : float
        Added to the diagonal of the covariance: positive in training, not negative in evaluation.
        Where a group has as many channels as there are values in each, or more, the covariance has
        eigenvalues of 0, and `eps` alone decides what becomes of them.
    num_groups : int
        G, which divides C: neighbouring channels are whitened together.
    averaged : str
        What is averaged over the batches: "whitening", the matrices W, as the authors do; or
        "covariance", the covariances over M, without eps, of which W is made in each evaluation.
        The two differ: the mean of roots is not the root of the mean.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
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
        Where a running statistic of float32 becomes infinite, though that of the batch is finite.

    Notes
    -----
    In training, for the columns x_n of each group, over all axes but `axis`::

        mu    = mean(x_n)
        Sigma = mean((x_n - mu) (x_n - mu).T) + eps I = D diag(l) D.T
        W     = D diag(1 / sqrt(l)) D.T
        y_n   = weight * (W (x_n - mu)) + bias
        running_mean   = (1 - momentum) * running_mean   + momentum * mu
        running_matrix = (1 - momentum) * running_matrix + momentum * W or (Sigma - eps I)

    in evaluation, mu = running_mean, and W = running_matrix or that of running_matrix + eps I. The
    root is the symmetric one (ZCA): of all that whiten, the nearest to `x`. With one channel in
    each group it is `batch_norm`. Momenta of 0 and 1 do what they do there.

    In float64 throughout, and rounded once. A NaN or infinity makes its whole group NaN, and
    changes no other. Products and eigenvalues are those of NumPy's BLAS and LAPACK: they decide the
    last bits, which may differ from machine to machine, and their threads are their own, each with
    the float mode that it has.

    References
    ----------
    L. Huang, D. Yang, B. Lang, J. Deng, 2018, "Decorrelated Batch Normalization", arXiv:1804.08450.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[0.0, 0.0], [2.0, 2.0], [4.0, 0.0], [6.0, 2.0]], dtype=np.float32)
    >>> y = bnfast.decorrelated_batch_norm(x, training=True)
    >>> np.cov(y.T, bias=True).round(3)
    array([[1., 0.],
           [0., 1.]])
    """
    whiten = partial(Whitened.of_covariance, eps=_epsilon(eps, training))
    return _whitened(
        *(whiten, x, running_mean, running_matrix, weight, bias, training, momentum),
        *(num_groups, averaged, axis, out),
    )


@in_default_float_mode
def decorrelated_batch_norm_forward(
    x: ArrayLikeOf[Float],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    num_groups: int = 1,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Whitened]:
    """Whiten with the statistics of the batch and return them for the backward pass.

    Parameters
    ----------
    x, weight, bias, eps, num_groups, axis, out
        As in `decorrelated_batch_norm` in training.

    Returns
    -------
    y : array like `x`
        The whitened batch.
    saved : Whitened
        mean, matrix, eigenvalues and eigenvectors.

    Raises
    ------
    TypeError, ValueError
        As `decorrelated_batch_norm`.

    Notes
    -----
    The formula stands in `decorrelated_batch_norm`.

    References
    ----------
    L. Huang, D. Yang, B. Lang, J. Deng, 2018, arXiv:1804.08450.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[0.0, 0.0], [2.0, 2.0], [4.0, 0.0], [6.0, 2.0]])
    >>> y, saved = bnfast.decorrelated_batch_norm_forward(x, num_groups=2)
    >>> saved.mean, saved.matrix.round(3)
    (array([3., 1.]), array([[[0.447]],
    <BLANKLINE>
           [[1.   ]]]))
    """
    whiten = partial(Whitened.of_covariance, eps=_epsilon(eps, True))
    return _whitening.normalize(x, axis, num_groups, whiten, weight, bias, out=out)


@in_default_float_mode
def decorrelated_batch_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    saved: Whitened,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array]:
    """Return the gradients of decorrelated batch normalization: of its input, weight and bias.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x : array of float32 or float64, at least 2-d
        The input of the forward pass.
    saved : Whitened
        What the forward pass returned; in evaluation ``Whitened(running_mean, running_matrix)``, or
        `Whitened.of_covariance` of them where the covariance is averaged.
    weight : array (C,) of float32 or float64, optional
        gamma; 1 where None.
    axis : int
        The channel axis.
    training : bool
        Whether `saved` came from `x`. If not it is constant, only its mean and its matrix are
        needed, and the gradient does not pass through them.
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
    With g_n = weight * dy_n, c_n = x_n - mu, and sums and means over all axes but `axis`::

        dbias   = sum(dy_n)
        dweight = sum(dy_n * (W c_n))
        dW      = sum(g_n c_n.T)
        dx_n    = W.T (g_n - mean(g_n)) + (dSigma + dSigma.T) c_n / M                in training
        dx_n    = W.T g_n                                                            in evaluation

    where `Whitened.covariance_gradient` makes dSigma of dW, without a singularity where eigenvalues
    are equal. Two passes over `dy` and `x`. What the BLAS decides, see `decorrelated_batch_norm`.

    References
    ----------
    L. Huang, D. Yang, B. Lang, J. Deng, 2018, arXiv:1804.08450.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[0.0, 0.0], [2.0, 2.0], [4.0, 0.0], [6.0, 2.0]])
    >>> y, saved = bnfast.decorrelated_batch_norm_forward(x)
    >>> dx, dweight, dbias = bnfast.decorrelated_batch_norm_backward(np.ones_like(x), x, saved)
    >>> dbias
    array([4., 4.])
    >>> bool(np.abs(dx).max() < 1e-12)
    True
    """
    _validation.saved_value(saved, Whitened, "decorrelated_batch_norm_forward")
    return _gradient(dy, x, saved, weight, axis, training, out)


@in_default_float_mode
def iterative_norm(
    x: ArrayLikeOf[Float],
    running_mean: ArrayLike | None = None,
    running_matrix: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    iterations: int = 5,
    num_groups: int = 1,
    averaged: str = WHITENING,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Whiten a batch nearly, by Newton's iterations rather than by eigenvalues: IterNorm.

    Parameters
    ----------
    x, running_mean, running_matrix, weight, bias, training, momentum, eps
        As in `decorrelated_batch_norm`.
    iterations : int
        T, at least 1. The more, the nearer to `decorrelated_batch_norm`; 5, the default, leave
        directions of small variance smaller than the others.
    num_groups, averaged, axis, out
        As in `decorrelated_batch_norm`.

    Returns
    -------
    array like `x`
        `out`, or a new array laid out like `x`.

    Raises
    ------
    TypeError, ValueError
        As `decorrelated_batch_norm`.

    Notes
    -----
    `decorrelated_batch_norm` with another W, where Sigma has eps on its diagonal::

        r   = 1 / trace(Sigma),     S = r Sigma
        P_0 = I,     P_k = 3/2 P_(k-1) - 1/2 P_(k-1)**3 S
        W   = sqrt(r) P_T

    P_k is computed with Q_k = S P_k beside it, both multiplied by 3/2 I - 1/2 P_(k-1) Q_(k-1): the
    same numbers, but rounding does not grow. As it stands above, it overflows after some 20 steps.

    References
    ----------
    L. Huang, Y. Zhou, F. Zhu, L. Liu, L. Shao, 2019, "Iterative Normalization: Beyond
    Standardization towards Efficient Whitening", arXiv:1904.03441.

    N. J. Higham, 1997, "Stable iterations for the matrix square root", Numerical Algorithms 15.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[0.0, 0.0], [2.0, 2.0], [4.0, 0.0], [6.0, 2.0]], dtype=np.float32)
    >>> y = bnfast.iterative_norm(x, training=True, iterations=2)
    >>> np.cov(y.T, bias=True).round(2)
    array([[0.97, 0.11],
           [0.11, 0.52]])
    """
    whiten = partial(
        IterativelyWhitened.of_covariance,
        eps=_epsilon(eps, training),
        iterations=_validation.integer_from("iterations", iterations, 1),
    )
    return _whitened(
        *(whiten, x, running_mean, running_matrix, weight, bias, training, momentum),
        *(num_groups, averaged, axis, out),
    )


@in_default_float_mode
def iterative_norm_forward(
    x: ArrayLikeOf[Float],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    iterations: int = 5,
    num_groups: int = 1,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], IterativelyWhitened]:
    """Whiten nearly, with the statistics of the batch, and return them for the backward pass.

    Parameters
    ----------
    x, weight, bias, eps, iterations, num_groups, axis, out
        As in `iterative_norm` in training.

    Returns
    -------
    y : array like `x`
        The whitened batch.
    saved : IterativelyWhitened
        mean, matrix, covariance and iterations.

    Raises
    ------
    TypeError, ValueError
        As `iterative_norm`.

    Notes
    -----
    The formula stands in `iterative_norm`.

    References
    ----------
    L. Huang, Y. Zhou, F. Zhu, L. Liu, L. Shao, 2019, arXiv:1904.03441.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[0.0, 0.0], [2.0, 2.0], [4.0, 0.0], [6.0, 2.0]])
    >>> y, saved = bnfast.iterative_norm_forward(x, iterations=7)
    >>> saved.mean, saved.iterations
    (array([3., 1.]), 7)
    """
    whiten = partial(
        IterativelyWhitened.of_covariance,
        eps=_epsilon(eps, True),
        iterations=_validation.integer_from("iterations", iterations, 1),
    )
    return _whitening.normalize(x, axis, num_groups, whiten, weight, bias, out=out)


@in_default_float_mode
def iterative_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    saved: IterativelyWhitened,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array]:
    """Return the gradients of iterative normalization: of its input, weight and bias.

    Parameters
    ----------
    dy, x, weight, axis, training, out
        As in `decorrelated_batch_norm_backward`.
    saved : IterativelyWhitened
        What the forward pass returned; in evaluation
        ``IterativelyWhitened(running_mean, running_matrix)``, or
        `IterativelyWhitened.of_covariance` of them where the covariance is averaged.

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
    As `decorrelated_batch_norm_backward`, with `IterativelyWhitened.covariance_gradient`: through
    the iterations, which are made again.

    References
    ----------
    L. Huang, Y. Zhou, F. Zhu, L. Liu, L. Shao, 2019, arXiv:1904.03441.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[0.0, 0.0], [2.0, 2.0], [4.0, 0.0], [6.0, 2.0]])
    >>> y, saved = bnfast.iterative_norm_forward(x)
    >>> dx, dweight, dbias = bnfast.iterative_norm_backward(np.ones_like(x), x, saved)
    >>> dbias
    array([4., 4.])
    """
    _validation.saved_value(saved, IterativelyWhitened, "iterative_norm_forward")
    return _gradient(dy, x, saved, weight, axis, training, out)


def _epsilon(eps: object, training: object) -> float:
    return _validation.epsilon(eps, training=_validation.flag("training", training))


def _mean_and_covariance(mean: object, covariance: object) -> tuple[Array, Array]:
    """Return both in float64, the latter symmetric."""
    matrices = _validation.matrices_of_groups("covariance", covariance)
    channels = matrices.shape[0] * matrices.shape[1]
    centre = _validation.required_channel_parameter("mean", mean, channels)
    with np.errstate(all="ignore"):
        half = 0.5 * matrices.astype(np.float64)
        return centre.astype(np.float64), half + half.swapaxes(1, 2)


def _newton_schulz(covariance: Array, steps: int) -> tuple[Array, list[tuple[Array, Array]]]:
    """Return 1 / r, and P_k and Q_k for k = 0 to T."""
    trace = np.trace(covariance, axis1=1, axis2=2)[:, None, None]
    root = np.broadcast_to(np.eye(covariance.shape[1]), covariance.shape)
    scaled = covariance / trace
    iterates = [(root, scaled)]
    for _ in range(steps):
        shrinking = _shrinking(root, scaled)
        root, scaled = shrinking @ root, scaled @ shrinking
        iterates.append((root, scaled))
    return trace, iterates


def _shrinking(root: Array, scaled: Array) -> Array:
    """Return 3/2 I - 1/2 P Q, by which an iteration multiplies both."""
    factor: Array = 1.5 * np.eye(root.shape[1]) - 0.5 * (root @ scaled)
    return factor


def _whitened(
    whiten: Callable[[Array, Array], Statistics],
    x: ArrayLikeOf[Float],
    running_mean: object,
    running_matrix: object,
    weight: object,
    bias: object,
    training: bool,
    momentum: object,
    num_groups: object,
    averaged: object,
    axis: int,
    out: NDArray[Float] | None,
) -> NDArray[Float]:
    if training:
        y, _ = _whitening.normalize(
            *(x, axis, num_groups, whiten, weight, bias),
            *(running_mean, running_matrix, momentum, averaged, out),
        )
        return y
    _validation.real("momentum", momentum)
    y, _ = _whitening.evaluate(
        *(x, axis, num_groups, whiten, weight, bias),
        *(running_mean, running_matrix, averaged, out),
    )
    return y


def _gradient(
    dy: object,
    x: object,
    saved: Whitened | IterativelyWhitened,
    weight: object,
    axis: int,
    training: bool,
    out: object,
) -> tuple[Array, Array, Array]:
    through = saved.covariance_gradient if _validation.flag("training", training) else None
    return _whitening.gradient(dy, x, axis, saved.mean, saved.matrix, through, weight, out)
