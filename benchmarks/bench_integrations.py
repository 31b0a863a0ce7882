"""Dask, scikit-learn, Keras: bnfast's way beside theirs, in turn.

``python benchmarks/bench_integrations.py`` prints the medians; pytest runs it once, on small data.
"""

import argparse
import contextlib
import os
import statistics
import time

import numpy as np
import pytest

import bnfast

os.environ["KERAS_BACKEND"] = "numpy"  # before Keras is imported

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


def keras_layers(batch, size):
    """Return layers, with the shape of their inputs and what they are called with."""
    from keras import layers

    images, few, tokens = (batch, size, size, 128), (batch, 14, 14, 256), (batch, 256, 768)
    return [
        (layers.BatchNormalization, {}, images, {"training": False}),
        (layers.BatchNormalization, {}, images, {"training": True}),
        (layers.BatchNormalization, {}, few, {"training": False}),
        (layers.BatchNormalization, {}, few, {"training": True}),
        (layers.GroupNormalization, {"groups": 32}, images, {}),
        (layers.LayerNormalization, {}, tokens, {}),
        (layers.RMSNormalization, {}, tokens, {}),
        (layers.UnitNormalization, {}, tokens, {}),
    ]


def keras_layer_times(batch, turns, size=56):
    """Return the times of layers, stock and swapped: whole calls, in CPU time."""
    from bnfast.integrations.keras import accelerate

    rows = []
    for kind, arguments, shape, keywords in keras_layers(batch, size):
        x = np.random.default_rng(0).normal(1, 2, shape).astype(np.float32)
        stock, ours = kind(**arguments), kind(**arguments)
        for layer in (stock, ours):
            layer.build(shape)
        accelerate(ours)
        calls = {
            "Keras": lambda layer=stock, x=x, k=keywords: layer(x, **k),
            "bnfast": lambda layer=ours, x=x, k=keywords: layer(x, **k),
        }
        title = f"{kind.__name__} {shape}{' training' if keywords.get('training') else ''}"
        rows.append((title, in_turn(calls, turns, time.process_time)))
    return rows


def group_norm_network(size=64, blocks=8, channels=64):
    """Residual blocks with group norm."""
    import keras
    from keras import layers

    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(channels, 3, 2, "same")(inputs)
    for _ in range(blocks):
        y = layers.ReLU()(layers.GroupNormalization(channels // 2)(x))
        x = layers.Add()([x, layers.Conv2D(channels, 3, padding="same")(y)])
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def transformer(tokens=196, width=384, blocks=6):
    """The blocks of a small vision transformer, after its patches."""
    import keras
    from keras import layers

    x = inputs = keras.Input((tokens, width))
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(width // 64, 64)(y, y)])
        y = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(width)(y)])
    return keras.Model(inputs, layers.LayerNormalization()(x))


def of_applications(name):
    def make():
        import keras

        return getattr(keras.applications, name)(weights=None)

    return make


KERAS_MODELS = {
    "DenseNet121": of_applications("DenseNet121"),
    "ResNet50": of_applications("ResNet50"),
    "MobileNetV2": of_applications("MobileNetV2"),
    "group norm network": group_norm_network,
    "transformer": transformer,
}


@contextlib.contextmanager
def seconds_in_normalization():
    """Add up the CPU time of normalization layers, in a list of one number."""
    from keras import layers

    seconds = [0.0]
    kinds = (layers.BatchNormalization, layers.GroupNormalization, layers.LayerNormalization)

    def timed(self, *arguments, **keywords):
        begin = time.process_time()
        y = super(type(self), self).__call__(*arguments, **keywords)
        seconds[0] += time.process_time() - begin
        return y

    for kind in kinds:
        kind.__call__ = timed
    yield seconds
    for kind in kinds:
        del kind.__call__


def keras_model_times(make, batch, turns):
    """Return the times of `predict`, stock and swapped, whole and in normalization alone."""
    import keras

    from bnfast.integrations.keras import accelerate

    rng = np.random.default_rng(0)
    stock = make()
    for layer in stock.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(rng.normal(0, 0.1, shape))
            layer.moving_variance.assign(rng.uniform(0.5, 2, shape))
    ours = keras.models.clone_model(stock)
    ours.set_weights(stock.get_weights())
    accelerate(ours)
    x = rng.random((batch, *stock.input_shape[1:]), np.float32)
    inside = {"Keras": [], "bnfast": []}

    def predict(name, model):
        def call():
            with seconds_in_normalization() as seconds:
                y = model.predict(x, batch_size=batch, verbose=0)
            inside[name].append(seconds[0])
            return y

        return call

    calls = {"Keras": predict("Keras", stock), "bnfast": predict("bnfast", ours)}
    np.testing.assert_allclose(calls["Keras"](), calls["bnfast"](), rtol=1e-3, atol=1e-3)
    whole = in_turn(calls, turns, time.process_time)
    return whole, {name: statistics.median(seconds[2:]) for name, seconds in inside.items()}


def bench_keras(benchmark):
    pytest.importorskip("keras")

    def once():
        layers = keras_layer_times(1, 1, size=4)
        return [*layers, *keras_model_times(lambda: group_norm_network(8, 1, 4), 2, 1)]

    assert len(benchmark.pedantic(once, rounds=1)) == 10


@pytest.mark.parametrize("calls", [lambda x: dask_calls(x, 1), scaler_calls], ids=["dask", "fit"])
def bench_integrations(benchmark, calls):
    pytest.importorskip("dask")
    pytest.importorskip("sklearn")
    times = benchmark.pedantic(lambda: in_turn(calls(table(1000)), 1), rounds=1)
    assert all(seconds > 0 for seconds in times.values())


def show(title, times, ours_of):
    print(f"\n{title}")
    for name, seconds in times.items():
        ours = times[ours_of(name)]
        print(f"  {name:28} {1e3 * seconds:9.1f} ms   {seconds / ours:6.2f} times bnfast's")


def show_tables(arguments):
    """Dask and scikit-learn, on a table."""
    x = table(arguments.rows)
    print(f"float32 table of {x.shape}")
    show(
        "Dask",
        in_turn(dask_calls(x, arguments.threads), arguments.turns),
        lambda name: "bnfast moments" if "da." in name or "moments" in name else "bnfast normalize",
    )
    show(
        "StandardScaler",
        in_turn(scaler_calls(x), arguments.turns),
        lambda name: "bnfast transform" if "transform" in name else "bnfast fit",
    )


def show_keras(arguments):
    """Keras on NumPy, layers and models: milliseconds of CPU time."""

    def row(title, times):
        keras, ours = (1e3 * times[name] for name in ("Keras", "bnfast"))
        return f"  {title:48} {keras:9.2f} ms {ours:9.2f} ms   {keras / ours:6.2f}"

    print("\nKeras, CPU time: stock, swapped, quotient")
    for batch in (8, 1):
        for title, times in keras_layer_times(batch, 5 * arguments.turns):
            print(row(title, times), flush=True)
    for name, make in KERAS_MODELS.items():
        for batch in (8, 1):
            whole, inside = keras_model_times(make, batch, arguments.turns)
            print(row(f"{name}, batch {batch}: predict", whole))
            print(row(f"{name}, batch {batch}: normalization layers", inside), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["tables", "keras"])
    arguments = parser.parse_args()
    bnfast.set_num_threads(arguments.threads)
    print(f"{arguments.threads} thread(s)")
    if arguments.only != "keras":
        show_tables(arguments)
    if arguments.only != "tables":
        show_keras(arguments)


if __name__ == "__main__":
    main()
