"""Other libraries: bnfast's way beside theirs, in turn.

``python benchmarks/bench_integrations.py`` prints the medians; pytest runs it once, on little data.
"""

import argparse
import statistics
import time

import numpy as np
import pytest

import bnfast

COLUMNS = 64


def in_turn(calls, turns, clock=time.perf_counter):
    """Return the median time of every call, after a first turn that is not timed."""
    times = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            begin = clock()
            call()
            if turn:
                times[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def table(rows):
    return np.random.default_rng(0).normal(1.5, 2, (rows, COLUMNS)).astype(np.float32)


def dask_calls(x, workers):
    """Statistics and normalization of a Dask array in memory, with so many threads of Dask's."""
    import dask
    import dask.array as da

    from bnfast.integrations.dask import moments, normalize

    chunks = da.from_array(x, chunks="auto")  # of 128 MiB, as Dask advises
    seen = moments(chunks)

    def of(call):
        def run():
            with dask.config.set(scheduler="threads", num_workers=workers):
                return call()

        return run

    return {
        "bnfast moments": of(lambda: moments(chunks)),
        "da.mean and da.std": of(lambda: dask.compute(chunks.mean(0), chunks.std(0))),
        "da.std": of(lambda: chunks.std(0).compute()),
        "bnfast normalize": of(lambda: normalize(chunks, seen).map_blocks(_nothing).compute()),
        "(x - mean) / std": of(
            lambda: (
                ((chunks - seen.mean.astype("f4")) / seen.std.astype("f4"))
                .map_blocks(_nothing)
                .compute()
            )
        ),
    }


def _nothing(block):
    """Take a chunk, as a file would, and leave nothing to put together."""
    return block[:1, :1]


def scaler_calls(x):
    """fit and transform of scikit-learn's StandardScaler, and of what oneDAL has instead."""
    from sklearn import preprocessing

    from bnfast.integrations.sklearn import StandardScaler

    ours, theirs = StandardScaler().fit(x), preprocessing.StandardScaler().fit(x)
    calls = {
        "bnfast fit": lambda: StandardScaler().fit(x),
        "scikit-learn fit": lambda: preprocessing.StandardScaler().fit(x),
        "bnfast transform": lambda: ours.transform(x),
        "scikit-learn transform": lambda: theirs.transform(x),
    }
    try:
        from sklearnex.basic_statistics import BasicStatistics
    except ImportError:
        return calls
    # scikit-learn-intelex has no StandardScaler: these are the statistics that it would need.
    wanted = ["mean", "variance"]
    return {**calls, "sklearnex BasicStatistics": lambda: BasicStatistics(wanted).fit(x)}


def autograd_calls(shape=(16, 64, 28, 28)):
    """The value and the gradient of a function of batch norm, float64."""
    import autograd.numpy as anp
    from autograd import value_and_grad

    from bnfast.integrations.autograd import batch_norm

    def formula(x, weight, bias):
        mean = anp.mean(x, (0, 2, 3), keepdims=True)
        invstd = 1 / anp.sqrt(anp.var(x, (0, 2, 3), keepdims=True) + 1e-5)
        xhat = (x - mean) * invstd
        return xhat * anp.reshape(weight, (1, -1, 1, 1)) + anp.reshape(bias, (1, -1, 1, 1))

    def ours(x, weight, bias):
        return batch_norm(x, None, None, weight, bias, training=True)

    def of(function):
        both = value_and_grad(lambda *arrays: anp.sum(function(*arrays) ** 2), (0, 1, 2))
        return lambda: both(x, weight, bias)

    x = np.random.default_rng(0).normal(size=shape)
    weight, bias = np.ones(shape[1]), np.zeros(shape[1])
    return {"bnfast batch_norm": of(ours), "the formula": of(formula)}


def thinc_calls(shape=(2000, 96)):
    """thinc's LayerNorm, forward and backward."""
    from thinc.api import LayerNorm

    from bnfast.integrations.thinc import accelerate

    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    theirs = LayerNorm(nI=shape[1]).initialize()
    ours = theirs.copy()
    accelerate(ours)

    def of(model):
        def both():
            _, backprop = model.begin_update(x)
            backprop(dy)

        return both

    return {"bnfast LayerNorm": of(ours), "thinc LayerNorm": of(theirs)}


def encoder_calls(shape=(2000, 96), blocks=4):
    """A training step of an encoder as spaCy's pipelines have it."""
    from thinc.api import Adam, Maxout, chain, clone, expand_window, residual

    from bnfast.integrations.thinc import accelerate

    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    width = shape[1]
    block = chain(expand_window(1), Maxout(width, 3 * width, nP=3, normalize=True))
    theirs = clone(residual(block), blocks).initialize(x, x)
    ours = theirs.copy()
    accelerate(ours)

    def of(model):
        optimizer = Adam(0.001)

        def step():
            y, backprop = model.begin_update(x)
            backprop(y / len(y))
            model.finish_update(optimizer)

        return step

    return {"bnfast encoder": of(ours), "thinc encoder": of(theirs)}


PEERS = {
    "dask": lambda: dask_calls(table(1000), 1),
    "sklearn": lambda: scaler_calls(table(1000)),
    "autograd": lambda: autograd_calls((2, 3, 4, 4)),
    "thinc": lambda: {**thinc_calls((5, 8)), **encoder_calls((5, 8), 2)},
}


@pytest.mark.parametrize("peer", PEERS)
def bench_integrations(benchmark, peer):
    pytest.importorskip(peer)
    times = benchmark.pedantic(lambda: in_turn(PEERS[peer](), 1), rounds=1)
    assert all(seconds > 0 for seconds in times.values())


def show(title, times, ours_of):
    print(f"\n{title}")
    for name, seconds in times.items():
        ours = times[ours_of(name)]
        print(f"  {name:28} {1e3 * seconds:9.2f} ms   {seconds / ours:6.2f} times bnfast's")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    x = table(arguments.rows)
    print(f"float32 table of {x.shape}, {arguments.threads} thread(s)")
    show(
        "Dask",
        in_turn(dask_calls(x, arguments.threads), arguments.turns),
        lambda name: "bnfast moments" if "da." in name or "moments" in name else "bnfast normalize",
    )
    bnfast.set_num_threads(arguments.threads)
    show(
        "StandardScaler",
        in_turn(scaler_calls(x), arguments.turns),
        lambda name: "bnfast transform" if "transform" in name else "bnfast fit",
    )
    show(
        "autograd: value and gradient, CPU time",
        in_turn(autograd_calls(), arguments.turns, time.process_time),
        lambda name: "bnfast batch_norm",
    )
    show(
        "thinc: forward and backward, CPU time",
        in_turn(thinc_calls(), 10 * arguments.turns, time.process_time),
        lambda name: "bnfast LayerNorm",
    )
    show(
        "thinc: a training step, CPU time",
        in_turn(encoder_calls(), arguments.turns, time.process_time),
        lambda name: "bnfast encoder",
    )


if __name__ == "__main__":
    main()
