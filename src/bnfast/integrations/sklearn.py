"""scikit-learn's estimators, computed by bnfast."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import bnfast
from bnfast._typing import Array
from bnfast.statistics import Moments

try:
    from scipy import sparse
    from sklearn import get_config, preprocessing
    from sklearn.base import _fit_context
    from sklearn.preprocessing._data import _handle_zeros_in_scale, _is_constant_feature
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "bnfast.integrations.sklearn needs scikit-learn 1.6 or newer: "
        'python -m pip install "scikit-learn>=1.6"'
    ) from error

__all__ = ["StandardScaler"]

_FLOATS = [np.float64, np.float32, np.float16]  # others become the first


class StandardScaler(preprocessing.StandardScaler):  # type: ignore[misc]  # it has no types
    """scikit-learn's ``StandardScaler``, computed by bnfast.

    Parameters, attributes, methods and errors are those of the parent class,
    ``sklearn.preprocessing.StandardScaler``. bnfast computes dense arrays of float32, float64 and
    integers, and what scikit-learn makes such arrays of. The rest is left to the parent class:
    sparse matrices, sample weights, float16, arrays of other libraries (``array_api_dispatch``),
    callbacks.

    Parameters
    ----------
    copy : bool
        False to transform in place where possible.
    with_mean, with_std : bool
        Whether to subtract the mean, and to divide by the standard deviation.

    Attributes
    ----------
    mean_, var_, scale_ : array (n_features,) of float64, or None
        The mean, the biased variance, and what is divided by: 1 for constant features.
    n_samples_seen_ : int, or array (n_features,) of int
        NaN does not count; an array where features have it in different numbers.
    n_features_in_, feature_names_in_
        As of the parent class.

    Notes
    -----
    `fit` makes no copy of float32 data or integers, and is as exact as `bnfast.moments`.
    `partial_fit` merges by `bnfast.Moments.merge`: batches give what their concatenation gives, up
    to the rounding of float64. What the parent class has fitted it fits on.

    Examples
    --------
    >>> import numpy as np
    >>> from bnfast.integrations.sklearn import StandardScaler
    >>> scaler = StandardScaler().fit(np.array([[0, 10], [2, 30]], np.uint8))
    >>> scaler.mean_
    array([ 1., 20.])
    >>> scaler.transform([[4, 20]])
    array([[3., 0.]])
    """

    def _reset(self) -> None:
        super()._reset()
        self.__dict__.pop("_moments", None)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> StandardScaler:
        """Add a batch to the statistics.

        Parameters
        ----------
        X : array (n_samples, n_features)
            The batch.
        y : None
            Ignored.
        sample_weight : array (n_samples,), optional
            What each sample counts for.

        Returns
        -------
        StandardScaler
            The estimator itself.
        """
        ours = hasattr(self, "_moments") or not hasattr(self, "n_samples_seen_")
        observed = hasattr(self, "_skl_callbacks") or hasattr(self, "_parent_callback_ctx")
        plain = ours and sample_weight is None and not observed and not _dispatches()
        if not (plain and self._fit_dense(X)):
            super().partial_fit(X, y, sample_weight)
            self.__dict__.pop("_moments", None)
        return self

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def _fit_dense(self, X: Any) -> bool:
        """Add a batch, unless it is one for the parent class."""
        seen: Moments | None = getattr(self, "_moments", None)
        kept = [X.dtype] if isinstance(X, np.ndarray) and _is_integer(X.dtype) else []
        x = validate_data(
            self,
            X,
            accept_sparse=("csr", "csc"),
            dtype=_FLOATS + kept,
            ensure_all_finite=False,
            reset=seen is None,
        )
        if _is_for_parent(x):
            return False
        batch = bnfast.moments(x)
        if not _all_finite(batch):
            check_array(
                x, dtype=None, ensure_all_finite="allow-nan", estimator=self, input_name="X"
            )
            batch = bnfast.moments(x, where=~np.isnan(x))
        self._set_statistics(batch if seen is None else seen.merge(batch))
        return True

    def _set_statistics(self, moments: Moments) -> None:
        count = np.array(moments.count)[()]
        mean = np.where(count == 0, np.nan, moments.mean)
        variance = np.where(count == 0, np.nan, moments.var)
        self._moments = moments
        self.n_samples_seen_ = count
        self.mean_ = mean if self.with_mean or self.with_std else None
        self.var_ = self.scale_ = None
        if self.with_std:
            constant = _is_constant_feature(variance, mean, count)
            self.var_ = variance
            self.scale_ = _handle_zeros_in_scale(np.sqrt(variance), False, constant)

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """Subtract the mean and divide by the scale.

        Parameters
        ----------
        X : array (n_samples, n_features)
            The data.
        copy : bool, optional
            In place of that of the estimator.

        Returns
        -------
        array (n_samples, n_features)
            float32 for float32, else float64.
        """
        check_is_fitted(self)
        mean = self.mean_ if self.with_mean else None
        factor: Any = self.scale_ if self.with_std else None
        if factor is not None:
            with np.errstate(all="ignore"):
                factor = 1.0 / factor
        y = self._scaled(X, copy, mean, factor, None, False)
        return super().transform(X, copy) if y is None else y

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Any:
        """Multiply by the scale and add the mean.

        Parameters
        ----------
        X : array (n_samples, n_features)
            The data.
        copy : bool, optional
            In place of that of the estimator.

        Returns
        -------
        array (n_samples, n_features)
            float32 for float32, else float64.
        """
        check_is_fitted(self)
        mean = self.mean_ if self.with_mean else None
        y = self._scaled(X, copy, None, self.scale_ if self.with_std else None, mean, True)
        return super().inverse_transform(X, copy) if y is None else y

    def _scaled(
        self,
        X: Any,
        copy: bool | None,
        mean: Array | None,
        factor: Array | None,
        bias: Array | None,
        inverse: bool,
    ) -> NDArray[Any] | None:
        """Return (x - mean) * factor + bias, or None of what is for the parent class."""
        if _dispatches() or (mean is None and factor is None and bias is None):
            return None
        copies = self.copy if copy is None else copy
        how = {
            "accept_sparse": "csr",
            "dtype": _FLOATS,
            "force_writeable": not copies,
            "ensure_all_finite": False,
        }
        # As in the parent class, the inverse asks for no names of features.
        x = check_array(X, **how) if inverse else validate_data(self, X, reset=False, **how)
        if _is_for_parent(x) or x.shape[1] != self.n_features_in_:
            return None
        if factor is not None and not _is_in_range(factor, x.dtype):
            return None
        if not _all_finite(bnfast.moments(x, None)):
            check_array(x, ensure_all_finite="allow-nan", estimator=self, input_name="X")
        converted = isinstance(X, np.ndarray) and X.dtype != x.dtype
        nothing, one = np.zeros(x.shape[1]), np.ones(x.shape[1])
        return bnfast.batch_norm(
            x,
            nothing if mean is None else mean,
            one,
            factor,
            bias,
            eps=0.0,
            out=None if copies and not converted else x,
        )


def _dispatches() -> bool:
    return bool(get_config()["array_api_dispatch"])


def _is_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biu" and dtype.isnative


def _is_for_parent(x: Any) -> bool:
    return bool(sparse.issparse(x) or x.dtype == np.float16)


def _all_finite(moments: Moments) -> bool:
    """Whether no value was NaN or infinite, which would show; False where squares overflowed."""
    return bool(np.isfinite(moments.mean).all() and np.isfinite(moments.m2).all())


def _is_in_range(factor: Array, dtype: np.dtype[Any]) -> bool:
    """Whether the type of the data holds the factor; NaN, of features without values, it does."""
    limits = np.finfo(dtype)
    return bool((np.isnan(factor) | ((factor >= limits.tiny) & (factor <= limits.max))).all())
