"""Dask arrays: any chunks, any scheduler, a cluster of processes, zarr, HDF5 and .npy on disk."""

import doctest
import math
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnfast
from bnfast import _threads

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
zarr = pytest.importorskip("zarr")

import bnfast.integrations.dask as integration  # noqa: E402  # where there is Dask
from bnfast.integrations.dask import moments, normalize, summary  # noqa: E402

SCHEDULERS = ["synchronous", "threads"]
CHUNKS = [(50, 7, 9), (20, 3, 4), ((1, 49), (2, 5), (9,)), (25, 7, 1)]
AXES = [1, 0, -1, (0, 1), (2, 0), None, (0, 1, 2)]


@pytest.fixture(scope="module")
def client():
    """A cluster of two processes."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(params=SCHEDULERS)
def scheduler(request):
    with dask.config.set(scheduler=request.param):
        yield request.param


def check(got, expected):
    np.testing.assert_array_equal(got.count, expected.count)
    assert np.shape(got.mean) == np.shape(expected.mean)
    error = np.abs(got.mean - expected.mean)
    assert (error <= 1e-12 * (np.abs(expected.mean) + expected.std)).all()
    np.testing.assert_allclose(got.m2, expected.m2, rtol=1e-12, atol=1e-20)
    if isinstance(expected, bnfast.Summary):
        for name in ("minimum", "maximum", "nonfinite"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_any_chunks_and_axes(scheduler, rng, chunks):
    x = rng.normal(100, 3, (50, 7, 9))
    mask = x > 99
    array = da.from_array(x, chunks=chunks)
    for axis in AXES:
        check(moments(array, axis), bnfast.moments(x, axis))
        check(summary(array, axis), bnfast.summary(x, axis))
        check(moments(array, axis, where=array > 99), bnfast.moments(x, axis, where=mask))
        check(summary(array, axis, where=mask), bnfast.summary(x, axis, where=mask))


@pytest.mark.parametrize("code", "?Bhl")
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_integers_are_exact(rng, code, chunks):
    low, high = (0, 1) if code == "?" else (-(2**7) * (code not in "BH"), 2**7 - 1)
    x = rng.integers(low, high, (50, 7, 9), endpoint=True).astype(code)
    with dask.config.set(scheduler="synchronous"):
        for axis in AXES:
            got = moments(da.from_array(x, chunks=chunks), axis)
            if code == "l":  # through float64
                check(got, bnfast.moments(x, axis))
            else:
                assert got == bnfast.moments(x, axis)


def test_exact_sums_beyond_what_float64_holds_are_joined():
    x = np.ones((2**22, 3), np.uint16)
    x[:, 1] = 65535
    with dask.config.set(scheduler="synchronous"):
        for columns in ((1, 1, 1), (2, 1)):
            got = moments(da.from_array(x, chunks=(2**21, columns)))
            assert got == bnfast.moments(x)
            assert bnfast.Moments.from_bytes(got.to_bytes()) == got


@st.composite
def chunked(draw):
    """A shape and the sizes of its chunks."""
    shape, chunks = [], []
    for _ in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
        shape.append(sum(sizes))
        chunks.append(tuple(sizes))
    return tuple(shape), tuple(chunks)


@settings(max_examples=40, deadline=None)
@given(
    chunked(),
    st.sampled_from("efdBh"),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e3, 1e7]),
    st.booleans(),
    st.data(),
)
def test_no_chunks_change_the_statistics(sizes, code, seed, mean, masked, data):
    shape, chunks = sizes
    rng = np.random.default_rng(seed)
    x = rng.normal(mean if code in "fd" else 20, 3, shape).astype(code)
    where = rng.random(shape) < 0.6 if masked else None
    axis = data.draw(st.none() | st.lists(st.integers(0, x.ndim - 1), unique=True).map(tuple))
    wide = x.astype(np.float64)  # what is exact of float32 and float16 is so of its float64
    with dask.config.set(scheduler="synchronous"):
        got = summary(da.from_array(x, chunks=chunks), axis, where=where)
    if code in "ef":
        exact = bnfast.summary(wide, axis, where=where)
        np.testing.assert_allclose(got.m2, exact.m2, rtol=1e-6, atol=1e-20)
        np.testing.assert_array_equal(got.maximum, exact.maximum)
    else:
        check(got, bnfast.summary(x, axis, where=where))


def test_unknown_chunk_sizes(scheduler, rng):
    x = rng.normal(size=(50, 7, 9))
    some = da.from_array(x, chunks=(7, 3, 4))
    some = some[some[:, 0, 0] > 0]
    assert math.isnan(some.shape[0])
    rows = x[x[:, 0, 0] > 0]
    for axis in AXES:
        check(moments(some, axis), bnfast.moments(rows, axis))
    check(moments(some, where=some > 0), bnfast.moments(rows, where=rows > 0))
    y = normalize(some).compute()
    np.testing.assert_allclose(y.std((0, 2)), 1.0)
    with pytest.raises(ValueError, match=r"known sizes along axis 0: x.compute_chunk_sizes\(\)"):
        normalize(some, axis=0)


def test_the_same_bits_from_every_scheduler(client, rng):
    x = da.from_array(rng.normal(1e3, 1, (1000, 6)).astype(np.float32), chunks=(13, 4))
    value = moments(x, compute=False)
    results = [client.compute(value).result()]
    for scheduler, workers in [("synchronous", 1), ("threads", 1), ("threads", 3)]:
        results.append(value.compute(scheduler=scheduler, num_workers=workers))
    with dask.config.set(split_every=2):
        results.append(moments(x))
    assert all(result == results[0] for result in results)


def test_a_cluster_from_zarr_to_zarr(client, tmp_path, rng):
    images = rng.integers(0, 256, (60, 3, 16, 16)).astype(np.uint8)
    images[:, 2] = 7
    stored = zarr.create_array(
        store=str(tmp_path / "images.zarr"), shape=images.shape, chunks=(8, 2, 16, 16), dtype="u1"
    )
    stored[:] = images
    with client.as_current():
        x = da.from_zarr(str(tmp_path / "images.zarr"))
        assert moments(x) == bnfast.moments(images)
        assert summary(x, None) == bnfast.summary(images, None)
        normalize(x).to_zarr(str(tmp_path / "normalized.zarr"))
        with pytest.raises(ZeroDivisionError, match="chunk 3"):
            moments(x.map_blocks(fail_in_third, dtype=x.dtype))
    y = zarr.open_array(str(tmp_path / "normalized.zarr"), mode="r")[:]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(y[:, :2].std((0, 2, 3)), 1, rtol=1e-6)
    np.testing.assert_array_equal(y[:, 2], 0)  # all equal


def fail_in_third(block, block_info=None):
    if block_info is not None and block_info[0]["chunk-location"][0] == 3:
        raise ZeroDivisionError("chunk 3")
    return block


def test_files(scheduler, tmp_path, rng):
    h5py = pytest.importorskip("h5py")
    x = rng.normal(50, 2, (200, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = bnfast.moments(x.astype(np.float64))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = x
        for array in (mapped, file["x"]):
            got = moments(da.from_array(array, chunks=(33, 2)))
            np.testing.assert_allclose(got.m2, expected.m2, rtol=1e-6)


def test_a_chunk_that_fails_raises_its_own_error(scheduler):
    x = da.ones((40, 5), chunks=(8, 5)).map_blocks(fail_in_third, dtype=float)
    for call in (moments, summary, normalize):
        with pytest.raises(ZeroDivisionError, match="chunk 3"):
            call(x)
    with pytest.raises(TypeError, match="x must be an array without a mask"):
        moments(da.from_array(np.ones((4, 4))).map_blocks(np.ma.asarray))
    secretly = da.ones((4, 4)).map_blocks(np.ma.asarray, meta=np.empty((0, 0)))
    with pytest.raises(TypeError, match="x must be an array without a mask"):
        normalize(secretly, bnfast.moments(np.ones((4, 4)))).compute()


@pytest.mark.parametrize("code", "efdBl?")
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_normalize(rng, code, chunks):
    x = rng.normal(100, 3, (50, 7, 9)) > 99 if code == "?" else rng.normal(100, 3, (50, 7, 9))
    x = x.astype(code)
    array = da.from_array(x, chunks=chunks)
    with dask.config.set(scheduler="threads"):
        for axis in (0, 1, -1):
            y = normalize(array, axis=axis)
            assert y.chunks == array.chunks
            assert y.dtype == (np.float64 if code in "dil" else np.float32)
            got = y.compute()
            assert got.dtype == y.dtype
            others = tuple(d for d in range(3) if d != axis % 3)
            mean, std = (f(x.astype(float), axis=others, keepdims=True) for f in (np.mean, np.std))
            close = 1e-12 if y.dtype == np.float64 else 2e-6
            np.testing.assert_allclose(got, (x - mean) / std, rtol=close, atol=close)
    assert x.tobytes() == array.compute().tobytes()


def test_normalize_with_other_moments(rng):
    x = rng.normal(3, 2, (30, 4))
    seen = bnfast.moments(x[:10])
    y = normalize(da.from_array(x, chunks=7), seen, eps=0.5)
    np.testing.assert_allclose(y, (x - seen.mean) / np.sqrt(seen.var + 0.5), rtol=1e-12)
    alone = normalize(da.from_array(x[:, 0], chunks=7), bnfast.moments(x[:, 0], 0), axis=0)
    np.testing.assert_array_equal(alone, np.zeros(30))
    with pytest.raises(ValueError, match=r"moments must be of 4 channels, got shape \(3,\)"):
        normalize(da.from_array(x), bnfast.moments(x[:, :3]))
    with pytest.raises(TypeError, match="moments must be an instance of Moments"):
        normalize(da.from_array(x), x.mean(0))
    with pytest.raises(ValueError, match="eps must not be negative"):
        normalize(da.from_array(x), seen, eps=-1.0)


def test_nothing_is_computed_before_arguments_are_refused():
    def fail(block):
        raise AssertionError

    x = da.ones((6, 4), chunks=(2, 4)).map_blocks(fail, meta=np.empty((0, 0)))
    for error, match, call in [
        (TypeError, "x must be a Dask array", lambda: moments(np.ones((6, 4)))),
        (
            TypeError,
            "x must be float16, bfloat16, float32, float64, integers or booleans",
            lambda: normalize(x.astype("c8")),
        ),
        (ValueError, "axis must be from -2 to 1", lambda: summary(x, 2)),
        (ValueError, "axis must not name an axis twice", lambda: moments(x, (0, -2))),
        (TypeError, "axis must be an integer", lambda: normalize(x, axis=(0, 1))),
        (TypeError, "where must be a boolean array", lambda: moments(x, where=np.ones(4))),
        (ValueError, "where must broadcast to x", lambda: moments(x, where=np.ones(3, bool))),
        (ValueError, "where must broadcast", lambda: moments(x, where=np.ones((1, 6, 4), bool))),
        (TypeError, "finite must be True or False", lambda: summary(x, finite=1)),
        (TypeError, "compute must be True or False", lambda: moments(x, compute=0)),
    ]:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 0), (0,)], ids=str)
def test_little_or_nothing(scheduler, shape):
    x = np.ones(shape)
    axis = None if x.ndim == 0 else -1
    assert moments(da.from_array(x), axis) == bnfast.moments(x, axis)
    if x.ndim:
        assert normalize(da.from_array(x), axis=-1).compute().shape == shape


def test_values_that_are_not_finite(scheduler, rng):
    x = rng.normal(size=(60, 4))
    x[3, 1], x[40, 1], x[41, 2] = np.nan, np.inf, -np.inf
    array = da.from_array(x, chunks=(7, 3))
    check(summary(array, finite=True), bnfast.summary(x, finite=True))
    np.testing.assert_array_equal(summary(array).nonfinite, [0, 2, 1, 0])
    all_masked = moments(array, where=np.array([True, True, True, False]))
    assert all_masked.count.tolist() == [60, 60, 60, 0]
    assert all_masked.var[3] == 0


def threads_in_a_task():
    with integration._threads_of_task():
        return bnfast.get_num_threads(), bnfast.moments(np.ones((9, 2))).count


def test_a_task_has_one_thread_where_others_run_beside_it(monkeypatch, client):
    monkeypatch.setattr(_threads, "allowed_threads", lambda: 64)
    bnfast.set_num_threads(3)
    try:
        task = dask.delayed(threads_in_a_task)()
        most = bnfast.get_num_threads()
        assert task.compute(scheduler="synchronous") == (most, 9)
        assert task.compute(scheduler="threads") == (1, 9)
        assert client.compute(task).result() == (1, 9)
        assert bnfast.get_num_threads() == most
    finally:
        bnfast.set_num_threads(None)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(threads_in_a_task) == (1, 9)


def test_a_chunk_is_read_and_summed_in_one_task(tmp_path):
    da.ones((64, 5), chunks=(4, 5)).to_zarr(str(tmp_path / "x.zarr"))
    value = moments(da.from_zarr(str(tmp_path / "x.zarr")), compute=False)
    (optimized,) = dask.optimize(value)
    graph = dict(optimized.__dask_graph__())
    assert len(graph) <= 16 + 4  # chunks; a merge, the array on disk, the joined value


def test_the_examples_of_the_documentation_run():
    failed, tried = doctest.testmod(integration)
    assert (failed, tried > 0) == (0, True)


def test_without_dask_the_command_that_installs_it_is_named():
    code = "import sys; sys.modules['dask'] = None; import bnfast.integrations.dask"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'needs Dask: python -m pip install "dask[array,distributed]"' in done.stderr
