"""Loops compiled by Numba, as one would write them by hand for speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import prange

from bnfast._cli.bench.cell import EPS, Batch, Cell
from bnfast._cli.bench.rivals import Contender, NotOffered, Rival
from bnfast._typing import Array

# Sums may be reordered, which is what makes LLVM vectorize them, and products fused into them: the
# rival's best setting. bnfast allows itself neither.
FASTMATH = {"reassoc", "contract"}

# Below this size, and with one thread, the loops are compiled without threads: to enter a parallel
# region takes Numba some 20 microseconds.
SERIAL_BYTES = 1 << 20

# Rows of channels that the NHWC loops sum in the dtype of x before they go on in float64.
ROWS = 64


def inference_nchw(x, mean, var, weight, bias, eps, y):
    """(N, C, run)."""
    images, channels, run = x.shape
    for job in prange(images * channels):
        n, c = job // channels, job % channels
        scale = weight[c] / np.sqrt(var[c] + eps)
        shift = bias[c] - mean[c] * scale
        for i in range(run):
            y[n, c, i] = x[n, c, i] * scale + shift


def training_nchw(x, weight, bias, eps, y, means, invstds):
    """(N, C, run): a thread has a channel, twice for its statistics and once more for y."""
    images, channels, run = x.shape
    zero = x.dtype.type(0)
    for c in prange(channels):
        total = 0.0
        for n in range(images):
            part = zero
            for i in range(run):
                part += x[n, c, i]
            total += part
        mean = x.dtype.type(total / (images * run))
        total = 0.0
        for n in range(images):
            part = zero
            for i in range(run):
                part += (x[n, c, i] - mean) ** 2
            total += part
        invstd = 1 / math.sqrt(total / (images * run) + eps)
        means[c], invstds[c] = mean, invstd
        scale, shift = x.dtype.type(weight[c] * invstd), bias[c]
        for n in range(images - 1, -1, -1):  # the last ones are still in the cache
            for i in range(run):
                y[n, c, i] = (x[n, c, i] - mean) * scale + shift


def backward_nchw(dy, x, mean, invstd, weight, dx, dweight, dbias):
    """(N, C, run)."""
    images, channels, run = x.shape
    zero = x.dtype.type(0)
    for c in prange(channels):
        m = mean[c]
        total = total_product = 0.0
        for n in range(images):
            part, product = zero, zero
            for i in range(run):
                part += dy[n, c, i]
                product += dy[n, c, i] * (x[n, c, i] - m)
            total += part
            total_product += product
        dbias[c], dweight[c] = total, total_product * invstd[c]
        count = images * run
        scale = weight[c] * invstd[c]
        of_mean = x.dtype.type(total / count)
        of_var = x.dtype.type(total_product / count * invstd[c] * invstd[c])
        for n in range(images - 1, -1, -1):
            for i in range(run):
                dx[n, c, i] = (dy[n, c, i] - of_mean - (x[n, c, i] - m) * of_var) * scale


def inference_nhwc(x, mean, var, weight, bias, eps, y):
    """(rows, C)."""
    rows, channels = x.shape
    scale = weight / np.sqrt(var + eps)
    shift = bias - mean * scale
    for row in prange(rows):
        for c in range(channels):
            y[row, c] = x[row, c] * scale[c] + shift[c]


def training_nhwc(x, weight, bias, eps, y, means, invstds, sums):
    """(rows, C): a thread has a share of the rows, and reads four of them at a time."""
    rows, channels = x.shape
    threads = len(sums)
    share = (rows + threads - 1) // threads
    for thread in prange(threads):
        first, end = thread * share, min(rows, (thread + 1) * share)
        part = np.empty(channels, x.dtype)
        sums[thread] = 0
        for start in range(first, end, ROWS):
            stop = min(start + ROWS, end)
            part[:] = 0
            row = start
            while row + 4 <= stop:
                for c in range(channels):
                    part[c] += (x[row, c] + x[row + 1, c]) + (x[row + 2, c] + x[row + 3, c])
                row += 4
            while row < stop:
                for c in range(channels):
                    part[c] += x[row, c]
                row += 1
            for c in range(channels):
                sums[thread, c] += part[c]
    for c in range(channels):
        means[c] = sums[:, c].sum() / rows
    for thread in prange(threads):
        first, end = thread * share, min(rows, (thread + 1) * share)
        part = np.empty(channels, x.dtype)
        sums[thread] = 0
        for start in range(first, end, ROWS):
            stop = min(start + ROWS, end)
            part[:] = 0
            row = start
            while row + 4 <= stop:
                for c in range(channels):
                    mean = means[c]
                    d0, d1 = x[row, c] - mean, x[row + 1, c] - mean
                    d2, d3 = x[row + 2, c] - mean, x[row + 3, c] - mean
                    part[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
                row += 4
            while row < stop:
                for c in range(channels):
                    d = x[row, c] - means[c]
                    part[c] += d * d
                row += 1
            for c in range(channels):
                sums[thread, c] += part[c]
    scale = np.empty(channels, x.dtype)
    for c in range(channels):
        invstds[c] = 1 / math.sqrt(sums[:, c].sum() / rows + eps)
        scale[c] = weight[c] * invstds[c]
    for thread in prange(threads):
        first, end = thread * share, min(rows, (thread + 1) * share)
        for row in range(end - 1, first - 1, -1):
            for c in range(channels):
                y[row, c] = (x[row, c] - means[c]) * scale[c] + bias[c]


def backward_nhwc(dy, x, mean, invstd, weight, dx, dweight, dbias, sums, products):
    """(rows, C), as in training."""
    rows, channels = x.shape
    threads = len(sums)
    share = (rows + threads - 1) // threads
    for thread in prange(threads):
        first, end = thread * share, min(rows, (thread + 1) * share)
        part, product = np.empty(channels, x.dtype), np.empty(channels, x.dtype)
        sums[thread] = 0
        products[thread] = 0
        for start in range(first, end, ROWS):
            stop = min(start + ROWS, end)
            part[:] = 0
            product[:] = 0
            row = start
            while row + 2 <= stop:
                for c in range(channels):
                    m = mean[c]
                    g0, g1 = dy[row, c], dy[row + 1, c]
                    part[c] += g0 + g1
                    product[c] += g0 * (x[row, c] - m) + g1 * (x[row + 1, c] - m)
                row += 2
            while row < stop:
                for c in range(channels):
                    part[c] += dy[row, c]
                    product[c] += dy[row, c] * (x[row, c] - mean[c])
                row += 1
            for c in range(channels):
                sums[thread, c] += part[c]
                products[thread, c] += product[c]
    scale = np.empty(channels, x.dtype)
    of_mean = np.empty(channels, x.dtype)
    of_var = np.empty(channels, x.dtype)
    for c in range(channels):
        total, total_product = sums[:, c].sum(), products[:, c].sum()
        dbias[c], dweight[c] = total, total_product * invstd[c]
        scale[c] = weight[c] * invstd[c]
        of_mean[c] = total / rows
        of_var[c] = total_product / rows * invstd[c] * invstd[c]
    for thread in prange(threads):
        first, end = thread * share, min(rows, (thread + 1) * share)
        for row in range(end - 1, first - 1, -1):
            for c in range(channels):
                centred = x[row, c] - mean[c]
                dx[row, c] = (dy[row, c] - of_mean[c] - centred * of_var[c]) * scale[c]


@cache
def compiled(loop: Callable[..., None], parallel: bool) -> Callable[..., None]:
    """Return it as machine code, made for the types of its first call."""
    machine_code: Callable[..., None] = numba.njit(
        loop, parallel=parallel, fastmath=FASTMATH, nogil=True
    )
    return machine_code


class NumbaKernels(Rival):
    """The loops above."""

    takes_halves = False

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        numba.set_num_threads(threads)

    @property
    def version(self) -> str:
        """What is measured."""
        return str(numba.__version__)

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return a loop's call, on arrays of as few dimensions as it needs."""
        if cell.normalization != "batch":
            raise NotOffered("batch norm's loops alone are written")
        b: Batch = cell.data
        n, c, *_ = b.shape
        # Channels that are neighbours, also in NC, are what the NHWC loops are for.
        runs = b.axis == 1 and b.x.size > n * c
        flat = (n, c, -1) if runs else (-1, c)
        x, dy, out = (array.reshape(flat) for array in (b.x, b.dy, b.out))
        eps = b.dtype.type(EPS)
        saved = np.empty((2, c), b.dtype)
        parallel = self.threads > 1 and x.nbytes >= SERIAL_BYTES
        partial = np.empty((2, self.threads if parallel else 1, c))
        statistics = x, b.mean, b.var, b.weight, b.bias, eps
        gradient = dy, x, b.mean, b.invstd, b.weight
        loop, before, after = {
            ("inference", True): (inference_nchw, statistics, ()),
            ("inference", False): (inference_nhwc, statistics, ()),
            ("training", True): (training_nchw, (x, b.weight, b.bias, eps), (*saved,)),
            ("training", False): (training_nhwc, (x, b.weight, b.bias, eps), (*saved, partial[0])),
            ("backward", True): (backward_nchw, gradient, (*saved,)),
            ("backward", False): (backward_nhwc, gradient, (*saved, *partial)),
        }[cell.operation, runs]
        function = compiled(loop, parallel)

        def call() -> Array:
            y = np.empty_like(x) if fresh else out
            function(*before, y, *after)
            return y

        return Contender(call, lambda y: y.reshape(b.x.shape))
