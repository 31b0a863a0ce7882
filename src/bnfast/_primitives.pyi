from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import DTypeLike

from bnfast._core import Activation as Activation
from bnfast._core import Evaluation as Evaluation
from bnfast._core import empty_output as empty_output
from bnfast._typing import Array

Reads = Mapping[str, object] | None
Masked = tuple[object, object, object] | None  # mask, lengths, padding

class Reduction:
    per_sample: bool
    centred: bool
    any_eps: bool
    def __init__(
        self, *, per_sample: bool = False, centred: bool = True, any_eps: bool = True
    ) -> None: ...

BATCH: Reduction
PER_SAMPLE: Reduction
GROUPS: Reduction

def invstd_of_nothing(eps: float) -> float: ...
def moments(x: object, axis: object) -> tuple[int, Array, Array]: ...
def summarize(
    x: object, axis: object, where: object, extremes: bool, finite_only: bool
) -> tuple[Any, ...]: ...
def moments_of_sums(count: int | Array, sums: Array, squares: Array) -> tuple[Array, Array]: ...
def normalize(
    x: object,
    axis: object,
    weight: object,
    bias: object,
    eps: object,
    running_mean: object = None,
    running_var: object = None,
    momentum: object = 0.0,
    unbiased: bool = True,
    out: object = None,
    over: Reduction = ...,
    num_groups: object = None,
    m2: Array | None = None,
    activation: Activation | None = None,
    parameter: object = None,
    channel_eps: Array | None = None,
    reads: Reads = None,
    residual: object = None,
    masked: Masked = None,
) -> tuple[Array, Array, Array]: ...
def scale_shift(
    x: object,
    axis: object,
    mean: object,
    variance: object,
    weight: object,
    bias: object,
    eps: object,
    evaluation: Evaluation | None = None,
    out: object = None,
    reads: Reads = None,
    activation: Activation | None = None,
    residual: object = None,
    masked: Masked = None,
) -> Array: ...
def gradient(
    dy: object,
    x: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    constant_statistics: bool,
    out: object = None,
    over: Reduction = ...,
    grouped: bool = False,
    reads: Reads = None,
    masked: Masked = None,
) -> tuple[Array, Array, Array]: ...
def activated_gradient(
    dy: object,
    x: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    bias: object,
    activation: Activation | None,
    parameter: object,
    out: object = None,
    over: Reduction = ...,
    constant_statistics: bool = False,
    grouped: bool = False,
    sums: Array | None = None,
    reads: Reads = None,
) -> tuple[Array, Array, Array, Array | None]: ...
def fused_gradient(
    dy: object,
    x: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    constant_statistics: bool,
    out: object,
    over: Reduction,
    grouped: bool,
    bias: object,
    activation: Activation | None,
    residual: object,
    y: object,
    keeps: bool,
    reads: Reads = None,
    masked: Masked = None,
) -> tuple[Array, Array, Array, Any]: ...
def gradient_of_output(
    dy: object,
    y: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    constant_statistics: bool,
    out: object,
    activation: Activation | None,
) -> tuple[Array, Array, Array]: ...
def normalize_rows(
    x: object,
    normalized_shape: object,
    axis: object,
    weight: object,
    bias: object,
    eps: object,
    centred: bool,
    out: object = None,
    activation: Activation | None = None,
    residual: object = None,
) -> tuple[Array, Any, Array]: ...
def row_gradient(
    dy: object,
    x: object,
    normalized_shape: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    centred: bool,
    parameters: bool,
    out: object = None,
    bias: object = None,
    activation: Activation | None = None,
    residual: object = None,
    y: object = None,
    keeps: bool = False,
) -> tuple[Any, ...]: ...
def conditional_normalize(
    x: object,
    axis: object,
    weight: object,
    bias: object,
    eps: object,
    running_mean: object = None,
    running_var: object = None,
    momentum: object = 0.0,
    unbiased: bool = True,
    out: object = None,
) -> tuple[Array, Array, Array]: ...
def conditional_scale_shift(
    x: object,
    axis: object,
    mean: object,
    variance: object,
    weight: object,
    bias: object,
    eps: object,
    out: object = None,
) -> Array: ...
def conditional_gradient(
    dy: object,
    x: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    constant_statistics: bool,
    out: object = None,
) -> tuple[Array, Array, Array]: ...
def ghost_normalize(
    x: object,
    axis: object,
    ghost_size: object,
    weight: object,
    bias: object,
    eps: object,
    running_mean: object = None,
    running_var: object = None,
    weight_of_ghost: Callable[[int], float] | None = None,
    unbiased: bool = True,
    out: object = None,
) -> tuple[Array, Array, Array]: ...
def ghost_gradient(
    dy: object,
    x: object,
    axis: object,
    ghost_size: object,
    mean: object,
    invstd: object,
    weight: object,
    out: object = None,
) -> tuple[Array, Array, Array]: ...

class PartOfBatch:
    x: Array
    moments: Array
    channels: int
    count: int
    def __init__(
        self,
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
    ) -> None: ...
    def normalize(self, count: int, moments: Array, track: bool) -> tuple[Array, Array]: ...

def merge_moments(counts: Array, moments: Array) -> Array: ...

class PartOfGradient:
    x: Array
    sums: Array
    channels: int
    def __init__(
        self,
        dy: object,
        x: object,
        axis: object,
        mean: object,
        mean_low: Array | None,
        invstd: object,
        weight: object,
        out: object,
    ) -> None: ...
    def parameter_gradients(self) -> tuple[Array, Array]: ...
    def input_gradient(self, count: float, sums: Array) -> Array: ...

def gradient_sums(
    dy: object, x: object, axis: object, mean: object, invstd: object
) -> tuple[Array, Array]: ...
def input_gradient(
    dy: object,
    x: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    sum_dy: object,
    sum_dy_xhat: object,
    count: object,
    out: object = None,
) -> Array: ...
def update_running(
    tracked: tuple[Array, Array],
    momentum: float,
    mean: Array,
    second: Array,
    divisor: float = 1.0,
    names: tuple[str, str] = ...,
) -> None: ...
def blend(running: Array, momentum: float, values: Array, name: str) -> None: ...
def weight_norm(
    v: object, g: object, dim: object, eps: object, out: object
) -> tuple[Array, Array]: ...
def weight_norm_gradient(
    dw: object, v: object, g: object, norm: object, dim: object, eps: object, out: object
) -> tuple[Array, Array]: ...

class Divisor: ...

class Deviation(Divisor):
    def __init__(self, eps: object, inside: object, unbiased: object) -> None: ...

class Length(Divisor):
    def __init__(self, gamma: object, eps: object, floor: object) -> None: ...

def standardize(
    w: object, gain: object, divisor: Divisor, axis: object, out: object
) -> tuple[Array, Array, Array]: ...
def standardize_gradient(
    dy: object,
    w: object,
    mean: object,
    std: object,
    gain: object,
    divisor: Divisor,
    axis: object,
    out: object,
) -> tuple[Array, Array]: ...
def renormalize(
    x: object,
    running_mean: object,
    running_std: object,
    weight: object,
    bias: object,
    momentum: object,
    eps: object,
    r_max: object,
    d_max: object,
    axis: object,
    out: object,
) -> tuple[Array, Array, Array, Array, Array]: ...
def evaluate_renorm(
    x: object,
    axis: object,
    running_mean: object,
    running_std: object,
    weight: object,
    bias: object,
    evaluation: Evaluation | None = None,
    out: object = None,
) -> tuple[Array, Array]: ...
def renorm_gradient(
    dy: object,
    x: object,
    mean: object,
    invstd: object,
    r: object,
    d: object,
    weight: object,
    axis: object,
    out: object,
) -> tuple[Array, Array, Array]: ...
def compute_in(stored: DTypeLike, arithmetic: DTypeLike) -> None: ...
def probe_memory(kind: str, x: Array, y: Array, num_threads: int) -> None: ...
