"""``python -m bnfast stats``: arrays and images of any size, as one data set."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import bnfast
from bnfast._cli import main
from bnfast._cli.stats import source
from tolerances import CLOSE_F64, STATISTICS_OF_ANY_DATA


@pytest.fixture
def stats(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder; returns what it printed, or failed with.

    What fails, fails as well without rich, which only tables need.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments, fails=False, table=False):
        if not {"--normalize", "--json"} & set(arguments):
            if fails and not table:
                arguments += ("--json",)
            elif not fails:
                pytest.importorskip("rich")
        status = main(["stats", *map(str, arguments)])
        printed = capsys.readouterr()
        assert status == (1 if fails else 0), printed.err
        if fails:
            assert printed.out == ""
            assert printed.err.count("\n") == 1
            assert printed.err.startswith("python -m bnfast stats: ")
            return printed.err
        return printed.out

    return run


@pytest.fixture
def numbers(stats):
    def run(*arguments):
        return json.loads(stats(*arguments, "--json"))

    return run


@pytest.fixture
def small_blocks(monkeypatch):
    """Lets small arrays be read as large ones are."""
    monkeypatch.setattr(source, "_BLOCK", 1 << 10)
    monkeypatch.setattr(source, "_PER_CHANNEL", 0)


def check(got, x, axis):
    want = bnfast.summary(x, axis)
    in_single = x.dtype in (np.float16, np.float32)
    close = 2 * STATISTICS_OF_ANY_DATA[1] if in_single else CLOSE_F64
    for name in ("mean", "var", "std"):
        value = getattr(want, name)
        near = close * np.max(want.std) + 1e-300
        np.testing.assert_allclose(np.array(got[name], float), value, rtol=close, atol=near)
    for name in ("count", "minimum", "maximum", "nonfinite"):
        value = np.broadcast_to(getattr(want, name), np.shape(want.mean))
        np.testing.assert_array_equal(np.array(got[name], float), value)


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("shape", [(), (9,), (500, 3), (3, 500), (7, 5, 90), (4, 3, 20, 20)])
@pytest.mark.parametrize("code", ["f4", "f8", "u1", ">i2", ">f4", "f2", ">f2", "?"])
def test_any_array_in_blocks_has_the_statistics_of_the_whole(
    numbers, small_blocks, rng, order, shape, code
):
    x = np.asarray(rng.normal(60, 9, shape) if code != "?" else rng.random(shape) < 0.5)
    x = x.astype(code)
    np.save("x.npy", np.asarray(x, order=order))
    native = x.astype(x.dtype.newbyteorder("="))
    axes = [None, *((d,) for d in range(x.ndim)), (-1, 0), tuple(range(x.ndim))]
    for axis in axes if x.ndim > 1 else axes[: 1 + x.ndim]:
        text = "none" if axis is None else ",".join(map(str, axis))
        check(numbers("x.npy", "--axis", text), native, axis)


def test_float16_is_summed_as_it_is_stored(numbers, small_blocks, monkeypatch, rng):
    summed = []

    def counting(values, *arguments, **keywords):
        summed.append(values.dtype)
        return bnfast.summary(values, *arguments, **keywords)

    monkeypatch.setattr(source, "summary", counting)
    x = rng.normal(1000, 1, (500, 3)).astype(np.float16)
    np.save("x.npy", x)
    check(numbers("x.npy"), x, 1)
    assert len(summed) > 1 and set(summed) == {x.dtype}


def test_channels_are_axis_1_unless_there_is_but_one_axis(numbers, rng):
    np.save("x.npy", rng.normal(size=(2, 3, 4)))
    np.save("line.npy", np.arange(4.0))
    assert numbers("x.npy")["channels"] == [3]
    assert numbers("line.npy")["mean"] == 1.5


def test_integers_that_are_cut_between_channels_keep_exact_sums(numbers, small_blocks, rng):
    x = rng.integers(0, 2**16, (5, 2000)).astype(np.uint16)
    np.save("x.npy", x)
    np.save("y.npy", x[:, ::-1])
    got = numbers("x.npy", "y.npy", "--axis", 0)
    assert got["mean"] == [row.sum() / 2000 for row in x.astype(int)]
    assert got["var"] == bnfast.moments(x, 0).var.tolist()


def test_files_are_one_data_set(numbers, rng):
    x = rng.normal(1e6, 1, (900, 4))
    for number, part in enumerate(np.split(x, [10, 500])):
        np.save(f"{number}.npy", part)
    check(numbers("0.npy", "1.npy", "2.npy"), x, 1)


def test_values_that_are_not_finite(numbers, stats):
    x = np.array([[1.0, np.inf], [np.nan, 2.0], [3.0, 4.0]])
    np.save("x.npy", x)
    got = numbers("x.npy")
    assert got["nonfinite"] == [1, 1] and got["mean"] == [None, None]
    got = numbers("x.npy", "--finite")
    assert got["nonfinite"] == [1, 1] and got["mean"] == [2.0, 3.0] and got["count"] == [2, 2]
    assert "--finite" in stats("x.npy", "--normalize", fails=True)


def test_an_empty_array_has_no_values(numbers):
    np.save("x.npy", np.zeros((0, 2), np.float32))
    got = numbers("x.npy")
    assert got["count"] == [0, 0] and got["minimum"] == [None, None]


def test_saved_statistics_are_merged_again_and_again(numbers, stats, rng):
    x = rng.normal(size=(600, 3))
    np.save("a.npy", x[:100])
    np.save("b.npy", x[100:])
    stats("a.npy", "--save", "all.npz")
    arguments = ("all.npz", "b.npy", "--save", "all.npz")
    assert "all.npz exists, and is not written over" in stats(*arguments, fails=True)
    assert bnfast.Summary.load("all.npz").count == 100
    stats(*arguments, "--force")
    check(numbers("all.npz"), x, 1)
    assert bnfast.Summary.load("all.npz").count == 600
    assert sorted(os.listdir()) == ["a.npy", "all.npz", "b.npy"]
    bnfast.moments(x).save("moments.npz")
    assert "expected a saved Summary, got Moments" in stats("moments.npz", fails=True)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_members_of_npz(numbers, stats, small_blocks, rng, write):
    x = rng.normal(size=(4000, 3)).astype(np.float32)
    write("x.npz", first=x[:7], second=np.asfortranarray(x[7:]), labels=np.arange(5))
    got = numbers("x.npz", "--member", "first", "--member", "second")
    check(got, x, 1)
    message = stats("x.npz", fails=True)
    assert "x.npz: labels: expected 3 channels as in x.npz: first, got no channels" in message
    assert "--member" in message
    assert "expected --member to be one of first, second, labels, got third" in stats(
        "x.npz", "--member", "third", fails=True
    )
    got = numbers("x.npz", "--skip")
    check(got, x, 1)
    assert len(got["left_out"]) == 1 and "labels" in got["left_out"][0]


def npy_bytes(x):
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def write_npz(name, contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(name, "w", compression) as archive:
        for member, data in contents.items():
            archive.writestr(member, data)


BAD_ARRAYS = {
    "objects": (np.array([[{}]], object), "got Python objects"),
    "complex": (np.zeros((2, 2), np.complex64), "got complex64"),
    "dates": (np.zeros((2, 2), "datetime64[s]"), "got datetime64[s]"),
    "text": (np.zeros((2, 2), "U3"), "got <U3"),
    "records": (np.zeros(3, [("a", "f4")]), "got [('a', '<f4')]"),
    "long double": (np.zeros((2, 2), np.longdouble), f"got {np.dtype(np.longdouble)}"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_types_that_cannot_be_summed(stats, kind):
    x, message = BAD_ARRAYS[kind]
    np.save("x.npy", x)
    got = stats("x.npy", fails=True)
    assert "x.npy: expected integers or floats of at most 64 bits" in got and message in got


@pytest.mark.parametrize("length", [0, 5, 9, 60, 127, 128, 1000, 128 + 4 * 3000 - 1])
def test_truncated_npy(stats, length):
    whole = npy_bytes(np.zeros((1000, 3), np.float32))
    Path("x.npy").write_bytes(whole[:length])
    message = stats("x.npy", fails=True)
    assert message.startswith("python -m bnfast stats: x.npy: ")
    expected = "expected 12,000 bytes of data, got" if length >= 128 else "the file ends before"
    assert f"truncated: {expected}" in message


def test_foreign_bytes_are_no_npy(stats, rng):
    whole = bytearray(npy_bytes(np.zeros((10, 3), np.float32)))
    for place in range(0, 128, 2):
        changed = bytes([*whole[:place], rng.integers(256), *whole[place + 1 :]])
        Path("x.npy").write_bytes(changed)
        assert main(["stats", "x.npy", "--json"]) in (0, 1)


def test_members_that_are_truncated_or_changed(stats, small_blocks, rng):
    x = rng.normal(size=(900, 3))
    whole = npy_bytes(x)
    write_npz("x.npz", {"good.npy": whole, "bad.npy": whole[:-1]})
    message = stats("x.npz", fails=True)
    assert "x.npz: bad: truncated: expected 21,600 bytes of data, got 21,599" in message
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        write_npz("x.npz", {"x.npy": whole}, compression)
        data = bytearray(Path("x.npz").read_bytes())
        data[len(data) // 2] ^= 1
        Path("x.npz").write_bytes(data)
        assert "x.npz: x: cannot be read: " in stats("x.npz", fails=True)
    Path("x.npz").write_bytes(data[:-30])
    assert "x.npz: cannot be read: File is not a zip file" in stats("x.npz", fails=True)
    write_npz("x.npz", {})
    assert "x.npz: has no array" in stats("x.npz", fails=True)


def test_what_is_not_there_or_nothing_to_read(stats):
    message = stats("none.npy", fails=True)
    assert "none.npy: cannot be read: No such file or directory; see --skip" in message
    Path("folder").mkdir()
    assert "folder: expected a folder with images" in stats("folder", fails=True)
    Path("x.txt").touch()
    assert "x.txt: expected .npy, .npz, zarr, an image or a folder" in stats("x.txt", fails=True)
    assert "nothing could be read: x.txt" in stats("x.txt", "--skip", fails=True)


def test_other_channels_than_those_of_the_first_file(stats, numbers, rng, capsys):
    np.save("a.npy", np.eye(3))
    np.save("b.npy", np.ones((5, 2), np.float32))
    message = stats("a.npy", "b.npy", "--save", "s.npz", fails=True)
    assert "b.npy: expected 3 channels as in a.npy, got 2 channels" in message
    assert "float32 of shape (5, 2)" in message
    assert not Path("s.npz").exists()
    assert main(["stats", "a.npy", "b.npy", "none.npy", "--skip", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["count"] == [3, 3, 3]
    assert printed.err.count("left out: ") == 2
    for axis in (2, "0,-2"):
        message = stats("a.npy", "--axis", axis, fails=True)
        assert (
            f"a.npy: expected --axis to name axes of shape (3, 3), each once, got {axis}" in message
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--axis", "one"], "argument --axis: expected integers with commas between them, or none"),
        (["--json", "--normalize"], "--normalize: not allowed with argument --json"),
        (["--save", "x.npy"], "argument --save: expected a name that ends in .npz, got 'x.npy'"),
        (["--divide-by", "0"], "argument --divide-by: expected a finite number above 0, got '0'"),
        (["--convert", "CMYK"], "argument --convert: expected one of L, RGB, RGBA, got 'CMYK'"),
        (["--convert", "rgb"], "got 'rgb'; did you mean 'RGB'?"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(arguments, message, capsys):
    assert main(["stats", "x.npy", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bnfast stats: ") and message in line


def test_a_path_is_needed(capsys):
    assert main(["stats"]) == 2
    expected = "python -m bnfast stats: the following arguments are required: PATH\n"
    assert capsys.readouterr().err == expected


def layers(text):
    """Returns what the printed lines pass to both frameworks."""
    calls = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, arguments = line.partition("(")
            calls[name] = eval(f"dict({arguments}", {"dict": dict})
    return calls["torchvision.transforms.Normalize"], calls["keras.layers.Normalization"]


def test_lines_for_torchvision_and_keras(stats, rng):
    x = rng.integers(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    np.save("x.npy", x)
    printed = stats("x.npy", "--axis", -1, "--normalize")
    assert printed.startswith("# values divided by 255\n")
    torchvision, keras = layers(printed)
    scaled = x.reshape(-1, 3) / 255
    np.testing.assert_allclose(torchvision["mean"], scaled.mean(0), rtol=1e-6)
    np.testing.assert_allclose(torchvision["std"], scaled.std(0), rtol=1e-6)
    np.testing.assert_allclose(keras["mean"], scaled.mean(0), rtol=1e-6)
    np.testing.assert_allclose(keras["variance"], scaled.var(0), rtol=1e-6)
    assert "axis" not in keras
    assert layers(stats("x.npy", "--axis", 1, "--normalize"))[1]["axis"] == -3
    torchvision, keras = layers(stats("x.npy", "--axis", "none", "--normalize"))
    assert len(torchvision["mean"]) == 1 and keras["axis"] is None


def test_units_of_normalized_values_are_one(stats, rng):
    x = rng.integers(0, 256, (50, 3)).astype(np.uint8)
    np.save("bytes.npy", x)
    np.save("floats.npy", x / 255)
    np.save("shorts.npy", x.astype(np.uint16) * 257)
    bytes_, floats, shorts = (
        layers(stats(f"{name}.npy", "--normalize")) for name in ("bytes", "floats", "shorts")
    )
    assert bytes_ == floats == shorts
    message = stats("bytes.npy", "floats.npy", "--normalize", fails=True)
    assert "floats.npy: --normalize expects values of which 255 counts as 1" in message
    stats("bytes.npy", "--save", "s.npz")
    assert "--divide-by for saved statistics" in stats("s.npz", "--normalize", fails=True)
    assert layers(stats("s.npz", "--normalize", "--divide-by", 255)) == bytes_
    np.save("equal.npy", np.ones((4, 2)))
    assert "got 0 in channel 0" in stats("equal.npy", "--normalize", fails=True)


@pytest.mark.parametrize(
    "option", [("--member", "first"), ("--convert", "RGB"), ("--divide-by", 255)], ids=str
)
def test_an_option_that_changes_nothing_is_refused(stats, option):
    np.save("x.npy", np.eye(3))
    assert f"{option[0]} expects" in stats("x.npy", *option, fails=True)


def test_the_table(stats, rng):
    pytest.importorskip("rich")
    np.save("x.npy", np.arange(6000.0).reshape(2000, 3))
    printed = stats("x.npy")
    assert "x.npy: float64 of shape (2000, 3), axis 1" in printed
    assert "2,000" in printed and "2998.5" in printed and "5,997" not in printed
    assert "axis 1 (first of 2 inputs)" in " ".join(stats("x.npy", "x.npy").split())
    np.save("wide.npy", np.zeros((2, 5000), np.float32))
    printed = stats("wide.npy")
    assert "4999" in printed and "--json" in printed and printed.count("\n") < 300


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_memory_is_that_of_a_block(tmp_path):
    """A file of holes has no size on disk; reading it all would take 600 MB."""
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (50_000_000, 3))
    # Not getrusage: its maximum counts the process that this one was forked from.
    code = (
        "import sys; from bnfast._cli import main; main(sys.argv[1:]);"
        "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, "stats", str(tmp_path / "x.npy"), "--normalize"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "got 0 in channel 0" in done.stderr
    assert int(done.stdout.split()[1]) < 200_000  # kilobytes


@pytest.mark.skipif(shutil.which("head") is None, reason="no head")
def test_a_reader_that_leaves_is_no_error(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 200_000)))
    command = f"{sys.executable} -m bnfast stats {tmp_path / 'x.npy'} --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=600)
    assert done.stdout == "{" and done.stderr == ""


@pytest.mark.parametrize(
    ("package", "arguments"), [("rich", ["x.npy"]), ("PIL", ["x.png"]), ("zarr", ["x"])]
)
def test_what_is_missing_is_named_with_the_command_that_installs_it(
    stats, monkeypatch, package, arguments
):
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name == "bnfast._cli.stats.images":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    np.save("x.npy", np.eye(3))
    Path("x.png").touch()
    Path("x").mkdir()
    Path("x/zarr.json").touch()
    installed = {"PIL": "pillow"}.get(package, package)
    message = stats(*arguments, fails=True, table=package == "rich")
    assert message.startswith(f"python -m bnfast stats: needs {installed} for ")
    assert message.endswith('): python -m pip install "bnfast[stats]"\n')
    if package == "rich":
        assert json.loads(stats("x.npy", "--json"))["count"] == [3, 3, 3]


@pytest.fixture
def image():
    """Returns Pillow's Image, and writes an image of a mode."""
    module = pytest.importorskip("PIL.Image")

    def write(path, mode, size=(9, 7), seed=0):
        rng = np.random.default_rng(seed)
        bands = len(module.getmodebandnames(mode))
        shape = size if bands == 1 else (*size, bands)
        if mode == "I;16":
            pixels = rng.integers(0, 2**16, shape).astype(np.uint16)
        elif mode == "F":
            pixels = rng.normal(size=shape).astype(np.float32)
        else:
            pixels = rng.integers(0, 256, shape).astype(np.uint8)
        Path(path).parent.mkdir(exist_ok=True, parents=True)
        module.fromarray(pixels).save(path)
        return pixels

    return write


@pytest.mark.parametrize(
    ("mode", "labels", "ending"),
    [
        *(("L", ["L"], "png"), ("LA", ["L", "A"], "png"), ("RGB", ["R", "G", "B"], "PNG")),
        *(("RGBA", ["R", "G", "B", "A"], "png"), ("I;16", ["I"], "png"), ("F", ["F"], "tif")),
    ],
)
def test_images_of_any_size_are_one_data_set_of_pixels(
    numbers, image, small_blocks, mode, labels, ending
):
    sizes = [(9, 7), (1, 1), (300, 20), (5, 40)]
    pixels = [image(f"all/{n}/{n}.{ending}", mode, size, n) for n, size in enumerate(sizes)]
    Path("all/notes.txt").touch()
    Path("all/._0.png").touch()  # as macOS leaves them
    rows = np.concatenate([p.reshape(-1, len(labels)) for p in pixels])
    got = numbers("all")
    check(got, rows, 1)
    assert got["labels"] == labels and got["sources"] == [f"4 {mode} images"]
    check(numbers("all", "--axis", "none"), rows, None)
    one = numbers(f"all/0/0.{ending}", "--axis", -1)
    check(one, pixels[0].reshape(-1, len(labels)), 1)


def test_images_with_palettes_are_read_as_their_colours(numbers, image):
    module = pytest.importorskip("PIL.Image")
    colours = np.array([[[10, 20, 30], [200, 100, 0]]], np.uint8)
    module.fromarray(colours).convert("P", palette=module.Palette.ADAPTIVE).save("x.png")
    check(numbers("x.png"), colours.reshape(-1, 3), 1)


def test_images_of_other_modes_are_named_and_counted(numbers, stats, image):
    rows = [image(f"all/{n}.png", "RGB", seed=n).reshape(-1, 3) for n in range(5)]
    grey = image("all/5.png", "L")
    Path("all/6.png").write_bytes(Path("all/0.png").read_bytes()[:-40])
    Path("all/7.png").write_bytes(b"no image")
    message = stats("all", fails=True)
    assert "all/5.png: expected RGB as in all/0.png, got L" in message
    assert "of all images: 6 RGB, 1 L, 1 unreadable" in message and "--convert" in message
    got = numbers("all", "--skip")
    check(got, np.concatenate(rows), 1)
    assert [text.partition(": ")[0] for text in got["left_out"]] == [
        "all/5.png",
        "all/6.png",
        "all/7.png",
    ]
    for name in ("all/6.png", "all/7.png"):
        assert f"{name}: cannot be read: " in stats(name, fails=True)
        assert "nothing could be read: " in stats(name, "--skip", fails=True)
        Path(name).unlink()
    got = numbers("all", "--convert", "RGB")
    check(got, np.concatenate([*rows, np.repeat(grey.reshape(-1, 1), 3, 1)]), 1)
    assert got["left_out"] == []
    image("deep.png", "I;16")
    assert "expected 8 bits for --convert" in stats("deep.png", "--convert", "L", fails=True)
    assert "expected --axis -1 or none for images" in stats("all", "--axis", 1, fails=True)


def test_images_and_arrays_with_the_same_channels(numbers, stats, image):
    pixels = image("x.png", "RGB").reshape(-1, 3)
    np.save("x.npy", pixels[:4])
    check(numbers("x.npy", "x.png"), np.concatenate([pixels, pixels[:4]]), 1)
    torchvision, _ = layers(stats("x.png", "--normalize"))
    np.testing.assert_allclose(torchvision["mean"], pixels.mean(0) / 255, rtol=1e-6)
    np.save("x.npy", pixels[:, :2])
    assert "x.png: expected 2 channels as in x.npy, got 3" in stats("x.npy", "x.png", fails=True)


@pytest.fixture
def zarr():
    return pytest.importorskip("zarr")


def write_zarr(group, name, x, chunks):
    create = getattr(group, "create_array", None) or group.create_dataset
    create(name, shape=x.shape, chunks=chunks, dtype=x.dtype)[...] = x


@pytest.mark.parametrize("chunks", [(1, 1), (7, 2), (1000, 3), (300, 4)])
def test_zarr_in_blocks_of_its_chunks(numbers, small_blocks, rng, zarr, chunks):
    x = rng.normal(3, 2, (900, 4))[: 9 if chunks == (1, 1) else None]
    group = zarr.open_group("x.zarr", mode="w")
    write_zarr(group, "inner", x, chunks)
    for axis in (0, 1, None):
        text = "none" if axis is None else axis
        check(numbers("x.zarr/inner", "--axis", text), x, axis)


def test_arrays_in_groups_of_zarr(numbers, stats, rng, zarr):
    x = rng.integers(0, 200, (50, 3)).astype(np.uint8)
    group = zarr.open_group("x.zarr", mode="w")
    write_zarr(group, "a", x[:10], (4, 3))
    write_zarr(group.create_group("deep"), "b", x[10:], (40, 2))
    check(numbers("x.zarr"), x, 1)
    check(numbers("x.zarr", "--member", "deep/b"), x[10:], 1)
    message = stats("x.zarr/a", "--member", "a", fails=True)
    assert "x.zarr/a: expected a group of zarr for --member, got an array" in message
    message = stats("x.zarr", "--member", "c", fails=True)
    assert "expected --member to be one of a, deep/b, got c" in message


def test_zarr_that_cannot_be_read(stats, rng, zarr):
    group = zarr.open_group("x.zarr", mode="w")
    assert "x.zarr: has no array" in stats("x.zarr", fails=True)
    write_zarr(group, "a", np.zeros((5, 3), np.complex64), (5, 3))
    assert "x.zarr: a: expected integers or floats" in stats("x.zarr", fails=True)
    write_zarr(group, "b", rng.normal(size=(500, 3)), (500, 3))
    metadata = next(
        path for path in Path("x.zarr/b").iterdir() if path.name in ("zarr.json", ".zarray")
    )
    largest = max(
        (path for path in Path("x.zarr/b").rglob("*") if path.is_file() and path != metadata),
        key=lambda path: path.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[:100])
    assert "x.zarr/b: cannot be read: " in stats("x.zarr/b", fails=True)
    text = metadata.read_text().replace("float64", "float65").replace("<f8", "<f9")
    metadata.write_text(text)
    assert "x.zarr/b: cannot be read: " in stats("x.zarr/b", fails=True)
    metadata.write_text("{")
    assert "x.zarr/b: cannot be read: " in stats("x.zarr/b", fails=True)
