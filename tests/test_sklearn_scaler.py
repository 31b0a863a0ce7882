"""bnfast's StandardScaler: scikit-learn's own tests and checks, exactness, what the parent does."""

import doctest
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bnfast

sklearn = pytest.importorskip("sklearn", minversion="1.6")

from scipy import sparse  # noqa: E402  # where there is scikit-learn
from sklearn import preprocessing  # noqa: E402
from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.utils.estimator_checks import estimator_checks_generator  # noqa: E402

import bnfast.integrations.sklearn as integration  # noqa: E402
from bnfast.integrations.sklearn import StandardScaler  # noqa: E402

# The reference of this test is NumPy's mean of a column, which is 6.6e-6 off where the test lets it
# be 1.5e-6; see test_the_mean_that_is_not_compared.
INEXACT = "test_incremental_variance_numerical_stability"
CHECKS = [
    case
    for keywords in ({}, {"with_mean": False})
    for case in estimator_checks_generator(StandardScaler(**keywords))
    # Older versions ask for sparse data also where a mean is to be subtracted, which is refused.
    if keywords or "on_sparse_data" not in case[1].func.__name__
]


# Files of scikit-learn's tests, which of them, and how many these are at least.
THEIRS = {
    "preprocessing/tests/test_data.py": ("scaler", 250),
    "preprocessing/tests/test_common.py": ("test", 9),
    "utils/tests/test_extmath.py": (f"incremental and not {INEXACT}", 25),
}


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """How many of scikit-learn's tests of each file have passed with bnfast in its place."""
    folder, root = tmp_path_factory.mktemp("sklearn"), Path(sklearn.__file__).parent
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    command += ["-m", "pytest", "-c", str(folder / "pytest.ini"), "--rootdir", str(root), "-q"]
    command += ["-p", "scikit_learn_plugin", "-p", "no:cacheprovider"]
    selected = " or ".join(f"{Path(file).name} and {which}" for file, (which, _) in THEIRS.items())
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, "-k", selected, *(str(root / file) for file in THEIRS)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("file", THEIRS)
def test_their_tests_pass(passed, file):
    _, fewest = THEIRS[file]
    assert passed[file] >= fewest


def test_the_mean_that_is_not_compared():
    large, small = 1e8, np.log(1e-5)
    x = np.repeat([large, small], 5000)[:, None] * np.ones(2)
    exact = float((np.longdouble(large) + np.longdouble(small)) / 2)
    scaler = StandardScaler().fit(x[:5000])
    for row in x[5000:]:
        scaler.partial_fit(row[None])
    np.testing.assert_array_equal(scaler.mean_, exact)
    assert np.abs(x.mean(0) - exact).max() > 5e-6


@pytest.mark.parametrize(
    ("estimator", "check"), CHECKS, ids=[check.func.__name__ for _, check in CHECKS]
)
def test_their_checks_of_estimators(estimator, check):
    check(estimator)


def table(rng, code, rows=300):
    x = rng.normal(60, 9, (rows, 5))
    x[:, 3] = 7
    return x.astype(code)


def both(x, **keywords):
    return StandardScaler(**keywords).fit(x), preprocessing.StandardScaler(**keywords).fit(x)


@pytest.mark.parametrize("code", "fdebBhHilLQ?")
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("with_std", [True, False])
def test_results_are_those_of_the_parent(rng, code, order, with_mean, with_std):
    x = np.asarray(table(rng, code), order=order)
    ours, theirs = both(x, with_mean=with_mean, with_std=with_std)
    close = 1e-3 if code == "e" else 2e-6 if code == "f" else 1e-12
    for name in ("mean_", "var_", "scale_"):
        got, expected = getattr(ours, name), getattr(theirs, name)
        assert (got is None) == (expected is None)
        if got is not None:
            np.testing.assert_allclose(got, expected, rtol=close, atol=1e-30)
    assert ours.n_samples_seen_ == theirs.n_samples_seen_ == 300
    y = ours.transform(x)
    assert y.dtype == theirs.transform(x).dtype
    np.testing.assert_allclose(y, theirs.transform(x), rtol=close, atol=close)
    back = ours.inverse_transform(y)
    assert back.dtype == theirs.inverse_transform(y).dtype
    np.testing.assert_allclose(back, x, rtol=close)
    np.testing.assert_array_equal(ours.fit_transform(x), y)


def test_float32_far_from_zero_is_exact(rng):
    x = (1e6 + rng.normal(size=(5000, 4))).astype(np.float32)
    wide = x.astype(np.longdouble)
    expected = (wide - wide.mean(0)) / wide.std(0)
    assert np.abs(StandardScaler().fit_transform(x) - expected).max() < 1e-6


@pytest.mark.parametrize("code", "fdBh")
def test_batches_give_what_their_concatenation_gives(rng, code):
    x = table(rng, code) if code in "Bh" else (1e3 * table(rng, code)).astype(code)
    whole, parts = StandardScaler().fit(x), StandardScaler()
    for part in np.array_split(x, 37):
        assert parts.partial_fit(part) is parts
    close = 1e-6 if code == "f" else 1e-12
    if code in "Bh":
        np.testing.assert_array_equal(parts.var_, whole.var_)
    np.testing.assert_allclose(parts.var_, whole.var_, rtol=close)
    np.testing.assert_allclose(parts.mean_, whole.mean_, rtol=1e-12 if code != "f" else 1e-7)
    assert parts.n_samples_seen_ == 300
    parts.fit(x[:10])
    assert parts.n_samples_seen_ == 10


def test_nan_is_left_out_and_kept(rng):
    x = rng.normal(5, 2, (200, 4))
    x[rng.random(x.shape) < 0.2] = np.nan
    x[:, 3] = np.nan
    ours = StandardScaler().fit(x)
    with np.errstate(all="ignore"):
        theirs = preprocessing.StandardScaler().fit(x)
    np.testing.assert_array_equal(ours.n_samples_seen_, (~np.isnan(x)).sum(0))
    np.testing.assert_allclose(ours.mean_, theirs.mean_)
    np.testing.assert_allclose(ours.scale_, theirs.scale_)
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), atol=1e-12)
    ours.partial_fit(np.ones((3, 4)))
    assert ours.mean_[3] == 1
    assert ours.n_samples_seen_[3] == 3


def test_infinity_is_refused_and_changes_nothing(rng):
    x = rng.normal(size=(20, 3))
    scaler = StandardScaler().fit(x)
    before = scaler.mean_.copy()
    x[4, 1] = np.inf
    for call in (scaler.partial_fit, scaler.transform, scaler.inverse_transform):
        with pytest.raises(ValueError, match="Input X contains infinity"):
            call(x)
    np.testing.assert_array_equal(scaler.mean_, before)
    huge = np.full((10, 2), 1e300) * np.array([[1], [-1]] * 5)  # squares overflow, values do not
    assert np.isfinite(StandardScaler(with_std=False).fit_transform(huge)).all()


def test_in_place_on_request(rng):
    x = rng.normal(3, 2, (50, 3)).astype(np.float32)
    scaler = StandardScaler().fit(x)
    expected = scaler.transform(x)
    original = x.copy()
    y = scaler.transform(x, copy=False)
    assert y is x
    np.testing.assert_array_equal(x, expected)
    assert StandardScaler(copy=False).fit(x).transform(x) is x
    read_only = original.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(scaler.transform(read_only), expected)
    np.testing.assert_array_equal(scaler.transform(read_only, copy=False), expected)
    np.testing.assert_array_equal(read_only, original)
    integers = np.arange(12).reshape(4, 3)
    scaler.transform(integers, copy=False)
    np.testing.assert_array_equal(integers, np.arange(12).reshape(4, 3))


def test_a_scale_beyond_the_range_of_float32(rng):
    x = rng.normal(size=(40, 2)) * [1e-200, 1.0]
    ours, theirs = both(x, with_mean=False)
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x))
    with np.errstate(all="ignore"):
        for small in (ours, theirs):
            small.scale_ = np.array([1e-300, 1.0])
        narrow = np.ones((3, 2), np.float32)
        np.testing.assert_array_equal(ours.transform(narrow), theirs.transform(narrow))


def test_what_the_parent_class_does(rng):
    x = rng.normal(2, 1, (60, 4))
    weights = rng.random(60)
    ours = StandardScaler().fit(x, sample_weight=weights)
    theirs = preprocessing.StandardScaler().fit(x, sample_weight=weights)
    np.testing.assert_array_equal(ours.mean_, theirs.mean_)
    for scaler in (ours, theirs):  # which goes on in the parent class
        scaler.partial_fit(x)
    np.testing.assert_array_equal(ours.var_, theirs.var_)
    for container in (sparse.csr_array, sparse.csc_array, sparse.coo_matrix):
        scaler = StandardScaler(with_mean=False).fit(container(x))
        np.testing.assert_allclose(scaler.scale_, x.std(0))
        assert sparse.issparse(scaler.transform(container(x)))
        assert sparse.issparse(scaler.inverse_transform(container(x)))
    with pytest.raises(ValueError, match="Cannot center sparse matrices"):
        StandardScaler().fit(sparse.csr_array(x))
    scaler = StandardScaler(with_mean=False).fit(x).partial_fit(sparse.csr_array(x))
    np.testing.assert_allclose(scaler.scale_, x.std(0))
    assert scaler.n_samples_seen_ == 120
    assert scaler.partial_fit(x).n_samples_seen_ == 180


def test_estimators_are_pickled_and_cloned(rng):
    x = rng.normal(2, 1, (60, 4))
    scaler = StandardScaler().fit(x[:30])
    copied = pickle.loads(pickle.dumps(scaler)).partial_fit(x[30:])
    np.testing.assert_array_equal(copied.var_, scaler.partial_fit(x[30:]).var_)
    with pytest.raises(NotFittedError):
        clone(scaler).transform(x)
    assert repr(StandardScaler(with_mean=False)) == "StandardScaler(with_mean=False)"
    with pytest.raises(ValueError, match="'with_mean' parameter"):
        StandardScaler(with_mean=1).fit(x)


def test_names_and_containers(rng):
    polars = pytest.importorskip("polars")
    x = rng.normal(2, 1, (60, 2))
    frame = polars.DataFrame({"a": x[:, 0], "b": x[:, 1]})
    scaler, theirs = (
        kind().set_output(transform="polars").fit(frame)
        for kind in (StandardScaler, preprocessing.StandardScaler)
    )
    for name in ("feature_names_in_", "n_features_in_"):
        assert hasattr(scaler, name) == hasattr(theirs, name)
    assert list(scaler.get_feature_names_out()) == list(theirs.get_feature_names_out())
    y = scaler.transform(frame)
    assert y.columns == theirs.transform(frame).columns
    np.testing.assert_array_equal(y.to_numpy(), StandardScaler().fit(x).transform(x))


def test_what_is_routed_is_what_the_parent_routes():
    with sklearn.config_context(enable_metadata_routing=True):
        ours, theirs = StandardScaler(), preprocessing.StandardScaler()
        for scaler in (ours, theirs):
            scaler.set_fit_request(sample_weight=True).set_transform_request(copy=True)
        assert repr(ours.get_metadata_routing()) == repr(theirs.get_metadata_routing())


def test_the_examples_of_the_documentation_run():
    failed, tried = doctest.testmod(integration)
    assert (failed, tried > 0) == (0, True)


def test_without_scikit_learn_the_command_that_installs_it_is_named():
    code = "import sys; sys.modules['sklearn'] = None; import bnfast.integrations.sklearn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'python -m pip install "scikit-learn>=1.6"' in done.stderr


def test_moments_are_read_without_a_copy(rng):
    x = rng.integers(0, 256, (400, 3)).astype(np.uint8)
    assert StandardScaler().fit(x)._moments == bnfast.moments(x)
