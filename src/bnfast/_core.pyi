from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

from numpy.typing import NDArray

from bnfast._layout import LayoutPlan

Array = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])

HAS_OPENMP: bool
MEAN_TOO_LARGE: int
VAR_TOO_LARGE: int
SERIAL_BYTES: int
BYTES_PER_THREAD: int

class _BuildFacts(TypedDict):
    compiler: str
    openmp_version: int
    openmp_library: str | None

class Geometry:
    walked: tuple[int, ...]
    def __init__(self, plan: LayoutPlan) -> None: ...
    @property
    def row_blocks(self) -> int: ...

class Evaluation:
    @property
    def saved(self) -> tuple[Array, Array, Array | None] | None: ...

def built_isas() -> dict[str, str]: ...
def available_isas() -> tuple[str, ...]: ...
def active_isa() -> str: ...
def activate(isa: str) -> None: ...
def cache_sizes() -> tuple[int, int]: ...
def assume_cache_sizes(level2: int, last_level: int) -> None: ...
def GuardedFunction(function: Function, /) -> Function: ...  # a type, whose instances are called
def float_mode() -> int: ...
def assume_float_mode(mode: int) -> None: ...
def kernel_names() -> tuple[str, ...]: ...
def is_forked_child() -> bool: ...
def allowed_processors() -> int: ...
def openmp_max_threads() -> int: ...
def build_facts() -> _BuildFacts: ...
def moments(
    geometry: Geometry,
    x: Array,
    mean: Array,
    m2: Array,
    threads: int,
    mean_low: Array | None = None,
) -> None: ...
def normalize(
    geometry: Geometry,
    x: Array,
    y: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    mean: Array,
    invstd: Array,
    m2: Array | None,
    shared: int,
    uncentred: bool,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    correction: float,
    threads: int,
    floor: Array | None = None,
    more_eps: Array | None = None,
) -> int: ...
def update_running(running: Array, divided: Array, momentum: float, divisor: float) -> bool: ...
def scale_shift(
    geometry: Geometry,
    x: Array,
    y: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    mean: Array,
    variance: Array,
    kept: Evaluation | None,
    threads: int,
) -> None: ...
def gradient(
    geometry: Geometry,
    x: Array,
    dy: Array,
    dx: Array,
    weight: Array | None,
    mean: Array,
    invstd: Array,
    dweight: Array,
    dbias: Array,
    shared: int,
    uncentred: bool,
    constant_statistics: bool,
    threads: int,
    bias: Array | None = None,
    floor: Array | None = None,
    sum_floored: Array | None = None,
    sum_dy_deviation: Array | None = None,
) -> None: ...
def normalize_rows(
    geometry: Geometry,
    x: Array,
    y: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    mean: Array,
    invstd: Array,
    uncentred: bool,
    threads: int,
) -> None: ...
def row_gradient(
    geometry: Geometry,
    x: Array,
    dy: Array,
    dx: Array,
    weight: Array | None,
    mean: Array,
    invstd: Array,
    sums: Array | None,
    uncentred: bool,
    threads: int,
) -> None: ...
def limit_output_pool(bytes_: int) -> None: ...
def output_pool_bytes() -> int: ...
def empty_output(x: Array) -> Array: ...
def remember(x: Array, axis: int, operands: int, geometry: Geometry) -> None: ...
def remember_rows(
    x: Array, last_axes: int, operands: int, parameters: int, geometry: Geometry
) -> None: ...
def scale_shift_at_once(
    x: object,
    axis: object,
    mean: object,
    variance: object,
    weight: object,
    bias: object,
    eps: object,
    kept: Evaluation | None,
    out: object,
    serial_bytes: int,
    threads_for: Callable[[int], int],
) -> Array | None: ...
def normalize_at_once(
    x: object,
    axis: object,
    weight: object,
    bias: object,
    eps: object,
    running_mean: object,
    running_var: object,
    momentum: object,
    unbiased: bool,
    out: object,
    serial_bytes: int,
    threads_for: Callable[[int], int],
    warn_of: Callable[[int], None],
) -> tuple[Array, Array, Array] | None: ...
def gradient_at_once(
    dy: object,
    x: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    constant_statistics: bool,
    out: object,
    serial_bytes: int,
    threads_for: Callable[[int], int],
) -> tuple[Array, Array, Array] | None: ...
def normalize_rows_at_once(
    x: object,
    normalized_shape: object,
    weight: object,
    bias: object,
    eps: object,
    uncentred: bool,
    out: object,
    serial_bytes: int,
    threads_for: Callable[[int], int],
) -> tuple[Array, Array, Array] | None: ...
def row_gradient_at_once(
    dy: object,
    x: object,
    normalized_shape: object,
    mean: object,
    invstd: object,
    weight: object,
    uncentred: bool,
    parameters: object,
    out: object,
    serial_bytes: int,
    threads_for: Callable[[int], int],
) -> tuple[Array, Array | None, Array | None] | None: ...
def probe_memory(kind: str, x: Array, y: Array, threads: int) -> None: ...
