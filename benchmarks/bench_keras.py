"""Keras on NumPy: its normalization layers, stock and as `accelerate` leaves them, in turn.

``python benchmarks/bench_keras.py`` prints the tables of docs/keras.md, and writes them with
``--write``; pytest runs small layers and a small model once. Times are medians of the process's
CPU time, which other programs on the machine hardly lengthen; bnfast and NumPy have one thread.
"""

import argparse
import contextlib
import os
import statistics
import time

import numpy as np
import pytest

import bnfast
from bench_integrations import in_turn
from bnfast._cli.bench.run import machine
from make_tables import DOCS, write_between
from statistics_of_arrays import table

os.environ["KERAS_BACKEND"] = "numpy"  # before Keras is imported


def layer_cases(batch, size):
    """Return kinds of layers, their arguments, the shape of their input, and how it is called."""
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


def layer_times(batch, turns, size=56):
    """Yield a line for each layer: whole calls, of Keras and of bnfast."""
    from bnfast.integrations.keras import accelerate

    for kind, arguments, shape, keywords in layer_cases(batch, size):
        x = np.random.default_rng(0).normal(1, 2, shape).astype(np.float32)
        stock, ours = kind(**arguments), kind(**arguments)
        for layer in (stock, ours):
            layer.build(shape)
        accelerate(ours)
        calls = {
            "Keras": lambda layer=stock, x=x, k=keywords: layer(x, **k),
            "bnfast": lambda layer=ours, x=x, k=keywords: layer(x, **k),
        }
        training = ", training" if keywords.get("training") else ""
        name = f"{kind.__name__}{training}"
        times = in_turn(calls, turns, time.process_time)
        yield [name, "x".join(map(str, shape)), *compared(times)]


def compared(times):
    keras, ours = times["Keras"], times["bnfast"]
    texts = [f"{1e3 * t:.0f}" if t >= 0.1 else f"{1e3 * t:.3g}" for t in (keras, ours)]
    return [*texts, f"{keras / ours:.2f}"]


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


MODELS = {
    "DenseNet121": of_applications("DenseNet121"),
    "ResNet50": of_applications("ResNet50"),
    "MobileNetV2": of_applications("MobileNetV2"),
    "8 blocks with group norm": group_norm_network,
    "6 blocks of a vision transformer": transformer,
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
    try:
        yield seconds
    finally:
        for kind in kinds:
            del kind.__call__


def model_times(name, make, batch, turns):
    """Return a line: `predict`, of Keras and of bnfast, and the normalization layers in it."""
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

    def predict(of, model):
        def call():
            with seconds_in_normalization() as seconds:
                y = model.predict(x, batch_size=batch, verbose=0)
            inside[of].append(seconds[0])
            return y

        return call

    calls = {"Keras": predict("Keras", stock), "bnfast": predict("bnfast", ours)}
    np.testing.assert_allclose(calls["Keras"](), calls["bnfast"](), rtol=1e-3, atol=1e-3)
    whole = in_turn(calls, turns, time.process_time)
    layers = {of: statistics.median(seconds[2:]) for of, seconds in inside.items()}
    return [name, str(batch), *compared(whole), *compared(layers)]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")  # Keras's own
def bench_keras(benchmark):
    pytest.importorskip("keras")

    def once():
        small = model_times("small", lambda: group_norm_network(8, 1, 4), 2, 1)
        return [*layer_times(1, 1, size=4), small]

    assert len(benchmark.pedantic(once, rounds=1)) == 9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/keras.md")
    parser.add_argument("--turns", type=int, default=9, help="of models; five times as many layers")
    options = parser.parse_args()
    import keras
    from threadpoolctl import threadpool_limits

    bnfast.set_num_threads(1)
    threadpool_limits(1, "blas")  # whose threads wait for each other in CPU time
    layers = [line for batch in (8, 1) for line in layer_times(batch, 5 * options.turns)]
    models = [
        model_times(name, make, batch, options.turns)
        for name, make in MODELS.items()
        for batch in (8, 1)
    ]
    milliseconds = ["Keras: ms", "bnfast: ms", "times as fast"]
    layer_table = table(["layer", "input", *milliseconds], 2, layers)
    inside = ["layers, Keras: ms", "bnfast: ms", "times as fast"]
    model_table = table(["`predict` of", "batch", *milliseconds, *inside], 1, models)
    here = machine()
    about = (
        f"{here['cpu']}, {here['instruction set']}; one thread for bnfast and the BLAS, "
        f"{here['processors']} for JAX, which convolves; "
        f"Keras {keras.__version__}, NumPy {np.__version__}; float32."
    )
    for name, parts in {"layers": [layer_table], "models": [model_table, about]}.items():
        if options.write:
            write_between(DOCS / "keras.md", name, parts)
        else:
            print(*parts, "", sep="\n\n")


if __name__ == "__main__":
    main()
