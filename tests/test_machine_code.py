"""What the compiler made of the kernels: full-width vectors, and nothing above each variant."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from bnfast import _core


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def has_names():
    """Whether the linker left the names of functions in, as it does in all builds but wheels."""
    return ".symtab" in output_of("readelf", "-SW", _core.__file__)


pytestmark = pytest.mark.skipif(
    shutil.which("objdump") is None
    or shutil.which("readelf") is None
    or "avx2" not in _core.built_isas()
    or not has_names(),
    reason="needs binutils and an x86-64 build with the names of functions",
)

REGISTER = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
ABOVE = {"baseline": ("ymm", "zmm"), "avx2": ("zmm",), "avx512": ()}
PACKED = re.compile(r"\bv?(?:add|sub|mul|div|min|max)p[sd]\b.*%(xmm|ymm|zmm)")


@cache
def functions():
    """{variant or other source: {address: (name, instructions)}} of the compiled core."""
    source, places = "", {}
    for line in output_of("readelf", "-sW", _core.__file__).splitlines():
        fields = line.split()
        if len(fields) < 8:
            continue
        kind, name = fields[3], fields[7]
        if kind == "FILE":
            source = name
        elif kind == "FUNC" and fields[4] == "LOCAL":
            places[int(fields[1], 16)] = source
    made, name = {}, None
    for line in output_of("objdump", "-d", "--no-show-raw-insn", _core.__file__).splitlines():
        head = re.match(r"([0-9a-f]+) <(.+)>:$", line)
        if head:
            address = int(head[1], 16)
            name = made.setdefault(places.get(address, ""), {}).setdefault(address, (head[2], []))
        elif name and "\t" in line:
            name[1].append(line.partition("\t")[2])
    return made


def reached_from(variant, kernel):
    """The instructions of a kernel and of what it calls within its own object."""
    ours = functions()[f"variant_{variant}.c"]
    todo = [address for address, (name, _) in ours.items() if name.split(".")[0] == kernel]
    assert todo, f"{kernel} is not in the {variant} object"
    seen = []
    while todo:
        address = todo.pop()
        if address in seen or address not in ours:
            continue
        seen.append(address)
        for instruction in ours[address][1]:
            called = re.match(r"(?:call|jmp)q?\s+([0-9a-f]+)\b", instruction)
            if called:
                todo.append(int(called[1], 16))
    return [instruction for address in seen for instruction in ours[address][1]]


# Eight float64 at a time, and their eight float32, which fill half of the widest vectors.
EIGHTS = ("scale_shift_coefficients", "gradient_coefficients", "standardize", "invstd")

# SSE2 compares no integers of 64 bits.
SCALAR = {("baseline", "gate_coefficients_f64")}

# They convert and choose.
NO_ARITHMETIC = ("round_mean", "widen", "narrow", "activation_coefficients", "compress")


@pytest.mark.parametrize("variant", REGISTER)
@pytest.mark.parametrize("kernel", [k for k in _core.kernel_names() if k[:6] != "probe_"])
def test_every_kernel_has_arithmetic_at_full_width(variant, kernel):
    if (variant, kernel) in SCALAR:
        pytest.skip("the instruction set has no vectors for it")
    if variant == "baseline" and kernel.endswith("_f16") and not kernel.startswith(NO_ARITHMETIC):
        pytest.skip("without instructions that convert float16, it is converted in scratch")
    code = reached_from(variant, kernel)
    widths = [match[1] for match in map(PACKED.search, code) if match]
    wide = REGISTER[variant] in widths or (kernel.startswith(EIGHTS) and "ymm" in widths)
    assert wide or kernel.startswith(NO_ARITHMETIC), f"{variant} {kernel}: {set(widths)}"


# Where the loops of the reductions are, once inlined. Scalar arithmetic is left to tails, to single
# channels and to the careful sums of rare chunks.
REDUCTIONS = [
    f"{name}_{dtype}"
    for name in (
        "shifted_sums",
        "gradient_sums_runs",
        "add_deviations",
        "add_products",
        "sums_of_neighbours",
        "all_sums_of_neighbours",
    )
    for dtype in ("f32", "f64")
]


@pytest.mark.skipif(
    not _core.build_facts()["compiler"].startswith("GCC"),
    reason="other compilers unroll and inline otherwise",
)
@pytest.mark.parametrize("variant", REGISTER)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_arithmetic_of_reductions_is_mostly_at_full_width(variant, name):
    made = functions()[f"variant_{variant}.c"].values()
    clones = [code for called, code in made if called.split(".")[0] == name]

    def mostly_full(code):
        full = sum(f"%{REGISTER[variant]}" in i for i in code if PACKED.search(i))
        scalar = sum(bool(re.match(r"v?(?:add|sub|mul)s[sd]\b", i)) for i in code)
        return full > scalar

    # Of the compiler's copies for constant arguments, those for single channels are scalar.
    assert any(map(mostly_full, clones))


@pytest.mark.parametrize("variant", REGISTER)
def test_no_variant_goes_beyond_its_instruction_set(variant):
    for name, code in functions()[f"variant_{variant}.c"].values():
        for instruction in code:
            assert not [r for r in ABOVE[variant] if f"%{r}" in instruction], (name, instruction)


def test_nothing_outside_the_variants_uses_wide_vectors():
    for source, made in functions().items():
        if not source.startswith("variant_"):
            for name, code in made.values():
                wide = [i for i in code if "%ymm" in i or "%zmm" in i]
                assert not wide, (source, name, wide)


def test_no_fused_multiply_add():
    # a - b is made as a * 1 - b where lanes.inc says so, with the rounding in the instruction:
    # no compiler contracts to that.
    ours = re.compile(r"vfmsub(132|213|231)p[sd] \{rn-sae\},%zmm")
    for made in functions().values():
        for name, code in made.values():
            bad = [i for i in code if re.match(r"vfn?m(add|sub)", i) and not ours.match(i)]
            assert not bad, (name, bad)


def test_nothing_uses_registers_that_x87_shares():
    """What moves by way of MMX makes NaN of the next arithmetic in long double."""
    for source, made in functions().items():
        for name, code in made.values():
            assert not [i for i in code if re.search(r"%mm[0-7]", i)], (source, name)


def test_no_kernel_changes_the_float_mode():
    for source, made in functions().items():
        if source.startswith("variant_"):
            for name, code in made.values():
                assert not [i for i in code if re.match(r"v?ldmxcsr", i)], name


def test_only_one_function_asks_for_a_fused_subtraction():
    kernels = Path(__file__).parents[1] / "src" / "bnfast" / "_kernels"
    places = [
        (path.name, line.strip())
        for path in sorted(kernels.rglob("*.[hci]*"))
        for line in path.read_text().splitlines()
        if re.search(r"_fn?m(add|sub)|\bfmaf?\(|__builtin_fma", line)
    ]
    assert [name for name, _ in places] == ["lanes.inc", "lanes.inc"]
    assert all("_mm512_fmsub_round_p" in line and "one, " in line for _, line in places)


def test_only_the_module_is_exported():
    exported = [
        line.split()[-1]
        for line in output_of("nm", "-D", "--defined-only", _core.__file__).splitlines()
        if " T " in line
    ]
    assert exported == ["PyInit__core"]
