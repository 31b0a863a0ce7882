"""The one table of tolerances. Each is a multiple of the element type's eps, with its reason."""

import numpy as np

EPS = {np.dtype(np.float32): 2.0**-23, np.dtype(np.float64): 2.0**-52}

# y = ((x - mean_high) - mean_low) * scale + shift rounds six times with the rounding of scale, half
# an ulp each, of numbers as large as the largest y; and scale has half the error of m2.
OUTPUT = 4

# The promise of ARCHITECTURE.md for float32 output of normal values, whatever the mean.
PROMISED_OUTPUT_ERROR = 1e-6

# The promises of README.md for any data in float32, and with outliers. Outputs have as many ulps
# where they are larger than 2 (with outliers 1); gradients are relative to the terms that they are
# sums of, and dx rounds six times besides the sums in it. A variance rounds ten times by 2**-24 at
# most: deviations, which are squared, squares, and seven additions in pairs (5.2e-7 was found).
STATISTICS_OF_ANY_DATA = (6e-7, 1e-6)
OUTPUT_OF_ANY_DATA = (1e-6, 1e-6)
GRADIENT_SUMS_OF_ANY_DATA = (5e-7, 1e-6)
INPUT_GRADIENT_OF_ANY_DATA = (1e-6, 1.5e-6)

# Float64 has so many times as many ulps: there is nothing wider to empty its lanes into.
FLOAT64_OF_ANY_DATA = 4

# There are outliers where fewer than one value in so many makes up a sum (n * sum(t**2) is larger
# than so many times sum(t)**2): of squares, such a value is five standard deviations off.
OUTLIERS = 25

# How large |mean| / std may be; of float64, what tests can tell in long double with room to spare.
LARGEST_RATIO = {np.dtype(np.float32): 1e7, np.dtype(np.float64): 1e10}

# And how large or small a standard deviation, and the mean size of gradients: powers of two.
# Beyond, products may leave the range of the type.
LARGEST_EXPONENT = {np.dtype(np.float32): 50, np.dtype(np.float64): 400}

# Sums of at most 64 float32 values, in pairs and quads, then float64: relative error of m2. Of each
# value, the deviation, its square and at most seven additions round with a small bias.
MOMENTS = 4

# float64 sums by lanes: an error of the mean relative to the largest value, of m2 to itself. The
# lanes make it much better than n * eps.
MOMENTS_F64 = 32

# dx rounds seven times, numbers as large as the largest term; relative to the largest dx.
INPUT_GRADIENT = 16

# Sums of products over a channel, relative to the sum of their absolute values.
GRADIENT_SUMS = 4

# Sums of float64 that are all equal, which round alike in every addition: 256 additions in a row at
# most, of the rows of a box, each by a quarter of an ulp of half of the sum, in the mean.
EQUAL_SUMS = 32

# The largest singular value after 30 power iterations on a small matrix, whose second one is near.
POWER_ITERATIONS = 1e-3

# Running statistics: rounded to their own dtype, after float64 arithmetic on moments.
RUNNING = 4

# Whitening computes in float64 whatever the data: sums in the BLAS's own order, and an inverse root
# that multiplies their rounding by the condition of a covariance, 1e5 or so in the tests; relative
# to the largest value. Float32 results are rounded once more.
WHITENING = 2e-11
WHITENED = 1

# The same where the condition is large and known: multiples of float64's eps and of the condition.
ILL_CONDITIONED = 8

# Gradients where what was saved has been rounded to float32: its eps, multiplied by the root of a
# condition of 1e5 and by a few largest values.
ROUNDED_STATISTICS = 1e-3

# Central differences in float64 with a step of 1e-6: their own truncation error and cancellation.
FINITE_DIFFERENCES = 1e-7

# Derivatives of second to fourth order in float64, against compositions of elementary operations:
# each order multiplies the roundings of the one before by invstd and a few sums.
HIGHER_DERIVATIVES = 1e-10

# silu and hardswish, in ulps: a quotient of a sum of a power, which is rounded twice. Their
# gradients: of dz, which has as many, and of sums of it, relative to the largest terms.
CURVE_ULPS = 3
CURVE_GRADIENT = 64

# What `recalibrate` promises of statistics against NumPy's in float64.
RECALIBRATED = 1e-6

# Float32 outputs of whole models, or of layers whose peer computes variances as E[x^2] - E[x]^2:
# the peer's own roundings, which further layers multiply.
WHOLE_MODEL = 1e-3

# PyTorch's float32 modules as peers: their own error, which two steps of running statistics and, in
# gradients, sums over 60 products of normal numbers make larger; (relative, absolute).
PEER_OUTPUT = {"rtol": 1e-4, "atol": 1e-5}
PEER_GRADIENT = {"rtol": 1e-3, "atol": 1e-5}
PEER_PARAMETER_GRADIENT = {"rtol": 1e-3, "atol": 1e-4}

# Rivals of the benchmark, whose own errors it reports: where a group or row is a single value,
# invstd is up to 1 / sqrt(eps) times that of others, and ONNX keeps eps as float32.
RIVAL = {
    "float32": 1e-4,
    "float64": 1e-8,
    # Half a step of an output of 8 to 16, and what a rival rounds besides.
    "float16": 1e-2,
    "bfloat16": 1e-1,
}


# Where a test is about something else than exactness: float64 formulas of the same thing, whose
# sums go other ways; some tens of roundings to float32; one or a few of them.
CLOSE_F64 = 1e-13
CLOSE_F32 = 1e-5
ROUNDED_F32 = 1e-6

# What is computed in float32 is rounded once to narrower types: relative to itself, to nearest.
HALF_AN_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def eps_of(dtype):
    return EPS[np.dtype(dtype)]


# Data of 16 bits, computed in float32 and rounded once: which share of the elements may be rounded
# otherwise than the exact value, which lay so near to the middle of two numbers.
HALF_ROUNDED_OTHERWISE = 1e-3

# And how far elements may be off by more than their own step, relative to the largest one: where
# terms cancel, by a few roundings of float32.
HALF_TERMS = 4 * 2.0**-24
