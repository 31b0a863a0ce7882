"""docs/choosing.md: the cubes show what the functions do, and what the tables name exists."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import bnfast
from bnfast import folding

PAGE = Path(__file__).parent.parent / "docs" / "choosing.md"
if not PAGE.is_file():
    pytest.skip("these are tests of a clone or an sdist", allow_module_level=True)


@pytest.fixture(scope="module")
def draw_axes():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_axes", PAGE.with_name("draw_axes.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def running(channels=4, groups=None):
    """Running statistics, or the mean and the matrices of whitening."""
    if groups is None:
        return np.zeros(channels), np.ones(channels)
    size = channels // groups
    return np.zeros(channels), np.tile(np.eye(size), (groups, 1, 1))


def moving_average(x):
    """Uncorrected, or the running statistics would replace those of the batches."""
    return bnfast.moving_average_batch_norm(
        x, np.ones(4), np.ones((1, 4)), training=True, r_max=1.0
    )


def spectral(w):
    matrix = w.reshape(len(w), -1)
    return bnfast.spectral_norm(w, np.ones(len(matrix)), np.ones(matrix.shape[1]), 5)


# The functions that a cube of this name speaks of, of arrays (4, 4, 2, 2).
FUNCTIONS = {
    "batch": [
        lambda x: bnfast.batch_norm(x, *running(), training=True),
        lambda x: bnfast.conditional_batch_norm(x, None, None, *running(), training=True),
        lambda x: bnfast.batch_renorm(x, *running(), training=True),
        moving_average,
    ],
    "ghost batch": [lambda x: bnfast.ghost_batch_norm(x, 2, training=True)],
    "whitening": [
        lambda x: bnfast.decorrelated_batch_norm(x, *running(4, 2), training=True, num_groups=2),
        lambda x: bnfast.iterative_norm(x, *running(4, 2), training=True, num_groups=2),
    ],
    "instance, filter response": [bnfast.instance_norm, bnfast.filter_response_norm],
    "group": [lambda x: bnfast.group_norm(x, 2)],
    "layer, RMS: of an image": [
        lambda x: bnfast.layer_norm(x, x.shape[1:]),
        lambda x: bnfast.rms_norm(x, x.shape[1:]),
    ],
    "layer, RMS: of a pixel": [
        lambda x: bnfast.LayerNorm(4, axis=1, dtype=np.float64)(x),
        lambda x: bnfast.RMSNorm(4, axis=1, dtype=np.float64)(x),
    ],
    "weight norm, weight\nstandardization": [
        lambda w: bnfast.weight_norm(w, np.ones((4, 1, 1, 1))),
        bnfast.weight_standardization,
        bnfast.scaled_weight_standardization,
    ],
    "spectral norm": [spectral],
}


def test_every_cube_has_functions(draw_axes):
    assert [member.name for member in draw_axes.MEMBERS] == list(FUNCTIONS)


@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, some in FUNCTIONS.items() for i in range(len(some))]
)
def test_a_value_moves_the_outputs_that_its_cube_shows(draw_axes, name, number):
    (member,) = (member for member in draw_axes.MEMBERS if member.name == name)
    x = np.random.default_rng(0).uniform(1, 2, (4, 4, 2, 2))
    before = FUNCTIONS[name][number](x.copy())
    x[0, -1, 0, 0] += 0.5
    moved = FUNCTIONS[name][number](x) != before
    np.testing.assert_array_equal(moved.reshape(4, 4, 4), draw_axes.shared(member))


def test_the_cubes_are_small_and_the_same_bytes_each_time(draw_axes, tmp_path):
    for name in "ab":
        draw_axes.draw(tmp_path / name)
    drawn = (tmp_path / "a").read_bytes()
    assert drawn.startswith(b"\x89PNG") and len(drawn) < 100_000
    assert drawn == (tmp_path / "b").read_bytes()
    assert f"]({draw_axes.PICTURE.relative_to(PAGE.parent)})" in PAGE.read_text(encoding="utf-8")
    if PAGE.with_name("figures").is_dir():  # an sdist has no pictures
        assert draw_axes.PICTURE.is_file()


def test_what_takes_the_place_of_a_trained_layer_exists():
    text = PAGE.read_text(encoding="utf-8").partition("## With a trained model")[2]
    tables = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    taken = [cell for line in tables for cell in line.split(" | ")[1:]]
    code = " ".join(re.findall(r"`([^`]+)`", " ".join(taken)))
    classes = set(re.findall(r"\b[A-Z]\w*Norm\b", code))
    assert {"BatchNorm", "ConditionalBatchNorm", "SpectralNorm"} < classes
    functions = set(re.findall(r"\b[a-z]\w*_norm\b|\b\w+ing(?=\()", code))
    assert functions == {"batch_norm", "layer_norm", "rms_norm", "group_norm"} | {
        *("monitoring", "recalibrating")
    }
    for name in classes - {"SyncBatchNorm"} | functions:
        assert hasattr(bnfast, name), name
    for name, method in re.findall(r"\b([A-Z]\w+)\.(\w+)\(", code):
        assert hasattr(getattr(bnfast, name), method), (name, method)
    folds = set(re.findall(r"fold_into_\w+", code))
    assert folds == {"fold_into_previous", "fold_into_next"} < set(folding.__all__)
