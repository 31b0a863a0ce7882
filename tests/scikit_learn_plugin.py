"""A plugin of pytest, for scikit-learn's own tests: bnfast in the place of what they test.

The last line that pytest prints is JSON: how many tests of each file have passed.
"""

import json
from collections import Counter

import numpy as np
import sklearn.preprocessing
import sklearn.utils.extmath

import bnfast
from bnfast.integrations.sklearn import StandardScaler

theirs = sklearn.utils.extmath._incremental_mean_and_var
last = [None, None]  # the moments of the last call, and their mean as it was returned


def incremental_mean_and_var(X, last_mean, last_variance, last_sample_count, sample_weight=None):
    """What scikit-learn's function returns, of merged moments; with weights, its own.

    Who passes the mean that the last call returned goes on with the moments of that call, as an
    estimator does.
    """
    if sample_weight is not None or X.dtype == np.float16:
        return theirs(X, last_mean, last_variance, last_sample_count, sample_weight)
    batch = bnfast.moments(X, where=~np.isnan(X))
    seen, mean = last
    if last_mean is not mean:
        shape = batch.mean.shape
        count = np.broadcast_to(np.asarray(last_sample_count, int), shape)
        mean = np.array(np.broadcast_to(last_mean, shape), float)
        variance = 0.0 if last_variance is None else last_variance
        seen = bnfast.Moments(count, mean, variance * count)
    both = seen.merge(batch)
    last[:] = both, both.mean
    count = np.array(np.broadcast_to(both.count, both.mean.shape))
    return last[1], None if last_variance is None else both.var, count


sklearn.preprocessing.StandardScaler = StandardScaler
sklearn.preprocessing._data.StandardScaler = StandardScaler
sklearn.utils.extmath._incremental_mean_and_var = incremental_mean_and_var

passed = Counter()


def pytest_runtest_logreport(report):
    passed[report.fspath] += report.when == "call" and report.passed


def pytest_unconfigure():
    print(json.dumps(passed))
