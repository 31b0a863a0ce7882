"""Build bnfast: Cython in front, plain C behind, one object file for each instruction set."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy
from setuptools import Extension, setup  # before Cython, as Cython's documentation asks
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

from Cython.Build import cythonize  # isort: skip

KERNELS = "src/bnfast/_kernels"
WINDOWS = sys.platform == "win32"
MACHINE = sysconfig.get_platform().rpartition("-")[2]  # honours cross builds

# What each variant is compiled with. Every instruction set named here has its bit in
# cpu_features.c: change both or neither.
X86_64 = ["-march=x86-64"]  # undoes a user's CFLAGS=-march=native in every variant
# GCC moves pairs of pointers by way of MMX registers, and so leaves the x87 unit in disorder, which
# computes what is of long double.
X86_64 += ["-mno-mmx"]
AVX2 = [*X86_64, "-mavx2", "-mf16c"]
AVX512 = [
    *AVX2,
    *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
    "-mprefer-vector-width=512",
]
if MACHINE in ("x86_64", "amd64"):
    VARIANTS = {"baseline": X86_64, "avx2": AVX2, "avx512": AVX512}
else:
    VARIANTS = {"baseline": []}  # NEON is part of aarch64

# Strict IEEE: no fast-math, not even from a user's CFLAGS (its link step would also switch
# denormals off for the whole process), and no contraction: every instruction set rounds alike.
STRICT = ["-fno-fast-math"]
C_FLAGS = [
    *("-std=c11", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *(*STRICT, "-ffp-contract=off"),
]
KERNEL_FLAGS = [
    *C_FLAGS,
    "-fwrapv",
    *("-fopenmp-simd", "-fno-lto", "-fno-math-errno", "-fno-trapping-math"),
]
# What Pythons were built with, each in its own way, is left out of kernels, which are then the same
# for all of them.
OF_PYTHON = {
    "-DNDEBUG",
    "-Wno-unused-result",
    "-Wsign-compare",
    "-fno-strict-overflow",
    "-fwrapv",
    "-g",
}
# Where GCC knows it: else it makes calls and 16-byte moves of loops that copy a few vectors between
# memory and registers, and what was stored in two halves is waited for when it is read as a whole.
NO_CALLS_FOR_LOOPS = "-fno-tree-loop-distribute-patterns"
# Python's own flags ask for what debuggers need, ten times as large as the code and 0.4 of the time
# of a build. ``python setup.py build_ext --debug`` leaves it in.
NOTHING_FOR_DEBUGGERS = ["-g0", "-fno-asynchronous-unwind-tables"]
if WINDOWS:
    NOTHING_FOR_DEBUGGERS = []  # Clang writes nothing unasked, and every function has its table
# How compilers take OpenMP: flags to compile with, flags to link with. Apple's compiler knows the
# pragmas and brings no runtime: LLVM's lies where CFLAGS=-I and LDFLAGS=-L say.
OPENMP = [(["-fopenmp"], ["-fopenmp"])]
if sys.platform == "darwin":
    OPENMP.append((["-Xpreprocessor", "-fopenmp"], ["-lomp"]))


class BuildVariants(build_ext):
    """Compile each variant_<isa>.c with its own flags; use OpenMP where the compiler has it."""

    clang = None  # on Windows: the path of clang-cl
    openmp_library = None  # a library that must lie beside the extension

    def run(self):
        """Build, and bring the OpenMP library where Windows looks for it."""
        super().run()
        if self.openmp_library is not None:
            shutil.copy2(self.openmp_library, Path(self.get_ext_fullpath(core.name)).parent)

    def build_extensions(self):
        """Build all extensions, on Windows with Clang."""
        if WINDOWS:
            self.take_clang()
        super().build_extensions()

    def take_clang(self):
        """Let clang-cl compile in the place of Microsoft's cl, whose headers and linker stay.

        It is Clang with the options of cl, which does not know the vector types of the kernels.
        MinGW's GCC does, but may keep vectors of AVX where the stack is not aligned for them.
        """
        self.clang = shutil.which("clang-cl")
        if self.clang is None or self.compiler.compiler_type != "msvc":
            raise PlatformError(
                "on Windows bnfast is built by clang-cl, not by Microsoft's cl or MinGW's GCC: "
                "install LLVM for Windows, put the folder of clang-cl.exe on PATH, and leave the "
                "compiler of setuptools at its default (msvc)"
            )
        if not self.compiler.initialized:
            self.compiler.initialize(self.plat_name)
        self.compiler.cc = self.clang
        self.compiler.compile_options = [
            option
            for option in self.compiler.compile_options
            if option != "/GL"  # "make code when linking": of cl alone
        ]

    def build_extension(self, ext):
        """Build an extension, of the core first the variants that it links."""
        ext.extra_compile_args = self.spelled([*C_FLAGS, *VARIANTS["baseline"], *self.debugging()])
        ext.extra_link_args = [] if WINDOWS else [*STRICT]
        if ext.name == core.name:
            self.add_kernels(ext)
        super().build_extension(ext)

    def add_kernels(self, ext):
        """Compile the kernels for each instruction set, and let the extension use OpenMP."""
        to_compile, to_link = self.openmp_flags()
        ext.extra_compile_args += self.spelled(to_compile)
        ext.extra_link_args += to_link
        ext.extra_objects = []
        kernel_flags = [*KERNEL_FLAGS]
        if self.accepts(NO_CALLS_FOR_LOOPS):
            kernel_flags.append(NO_CALLS_FOR_LOOPS)
        # Side by side: each takes as long as all the rest.
        Path(self.build_temp, KERNELS).mkdir(parents=True, exist_ok=True)
        with self.without_flags_of_python(), ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = [
                pool.submit(self.compile_variant, isa, [*kernel_flags, *isa_flags])
                for isa, isa_flags in VARIANTS.items()
            ]
            ext.extra_objects += [path for objects in compiled for path in objects.result()]

    @contextmanager
    def without_flags_of_python(self):
        """Leave out what Python was built with; on Windows setuptools adds nothing of it."""
        if WINDOWS:
            yield
            return
        command = self.compiler.compiler_so
        self.compiler.compiler_so = [word for word in command if word not in OF_PYTHON]
        yield  # a failure ends the build
        self.compiler.compiler_so = command

    def spelled(self, flags):
        """Return flags of GCC and Clang as the compiler's command line takes them.

        clang-cl takes those of cl as they are, and Clang's own behind ``/clang:``.
        """
        return [f"/clang:{flag}" for flag in flags] if WINDOWS else [*flags]

    def debugging(self):
        """Return the flags about what debuggers need."""
        return [] if self.debug else NOTHING_FOR_DEBUGGERS

    def compile_variant(self, isa, flags):
        """Compile the kernels for one instruction set; return the paths of what came out."""
        return self.compiler.compile(
            [f"{KERNELS}/variant_{isa}.c"],
            output_dir=self.build_temp,
            include_dirs=[KERNELS],
            macros=[("BN_FLAGS", '"' + " ".join(flags) + '"')],
            debug=self.debug,
            extra_postargs=self.spelled([*flags, *self.debugging()]),
        )

    def accepts(self, flag):
        """Whether the compiler knows this flag, and not only puts up with it."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "flag.c")
            source.write_text("int main(void) { return 0; }\n")
            try:
                self.compiler.compile(
                    [str(source)],
                    output_dir=folder,
                    extra_postargs=["-Werror", *self.spelled([flag])],
                )
            except CompileError:
                return False
        return True

    def openmp_flags(self):
        """Return what to compile and to link with; nothing where BNFAST_NO_OPENMP=1 says so."""
        if os.environ.get("BNFAST_NO_OPENMP"):
            return [], []
        for to_compile, to_link in self.openmp_of_clang() if WINDOWS else OPENMP:
            try:
                self.run_parallel_region(to_compile, to_link)
            except Exception as error:
                print(f"no OpenMP by {' '.join(to_compile)}: {error}", file=sys.stderr)
            else:
                return to_compile, to_link
        print("building without OpenMP, bnfast will be serial", file=sys.stderr)
        self.openmp_library = None
        return [], []

    def openmp_of_clang(self):
        """Return the flags for LLVM's library, and note where it is; nothing where it is not."""
        library = Path(self.clang).with_name("libomp.dll")
        if not library.is_file():
            return []
        self.openmp_library = library
        return [(["-fopenmp"], [str(library.parent.parent / "lib" / "libomp.lib")])]

    def run_parallel_region(self, to_compile, to_link):
        """Compile, link and, unless it is for another machine, run a parallel region."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.c")
            source.write_text(
                "#include <omp.h>\n"
                "int main(void) { int n = 0;\n"
                "#pragma omp parallel reduction(+:n)\n"
                "n += 1; return n == 0 || omp_get_max_threads() < 1; }\n"
            )
            objects = self.compiler.compile(
                [str(source)], output_dir=folder, extra_postargs=self.spelled(to_compile)
            )
            self.compiler.link_executable(
                objects, "openmp", output_dir=folder, extra_postargs=to_link
            )
            if platform.machine().lower() == MACHINE:
                program = self.compiler.executable_filename("openmp", output_dir=folder)
                subprocess.run([program], check=True)


core = Extension(
    "bnfast._core",
    sources=[
        "src/bnfast/_core.pyx",
        "src/bnfast/_guarded_function.c",
        *(
            f"{KERNELS}/{name}.c"
            for name in (
                "schedule",
                "tasks",
                "row_tasks",
                "coefficients",
                "method",
                "kernel_calls",
                "mask",
                "masked",
                "summaries",
                "operands",
                "dispatch",
                "cpu_features",
                "cache_sizes",
                "openmp_runtime",
                "team",
                "output_memory",
                "system_windows" if WINDOWS else "system_posix",
            )
        ),
    ],
    include_dirs=["src/bnfast", KERNELS, numpy.get_include()],
    # A changed kernel must relink. Files only: cythonize copies them.
    depends=[
        "src/bnfast/_guarded_function.h",
        *(str(path) for path in sorted(Path(KERNELS).rglob("*")) if path.is_file()),
    ],
    define_macros=[
        ("NPY_NO_DEPRECATED_API", "NPY_1_25_API_VERSION"),
        ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION"),
        *((f"BN_HAVE_{isa.upper()}", "1") for isa in VARIANTS),
    ],
)

primitives = Extension(
    "bnfast._primitives",
    sources=["src/bnfast/_primitives.pyx"],
    include_dirs=core.include_dirs,
    define_macros=core.define_macros,
)

setup(
    cmdclass={"build_ext": BuildVariants},
    ext_modules=cythonize(
        [core, primitives],
        build_dir="build/cython",  # generated C stays out of src/
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "initializedcheck": False,
            "cdivision": True,
        },
    ),
)
