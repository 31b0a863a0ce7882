"""Train a network on several processes, each with a part of every batch: as one process would.

python -m pip install mpi4py mpich
mpiexec -n 2 python examples/train_distributed.py

The result is the same for any number of ranks, to rounding: batch norm has the statistics of the
whole batch, and the gradients are added up.
"""

import numpy as np
from mpi4py import MPI

from bnfast.distributed import MPICommunicator, SyncBatchNorm

world = MPI.COMM_WORLD
layer = SyncBatchNorm(16, MPICommunicator(world), dtype=np.float64)


def total(gradient):
    """Add up the gradients of all ranks."""
    return world.allreduce(gradient)


rng = np.random.default_rng(0)  # the same on every rank
first, second = rng.normal(size=(8, 16)) / 3, rng.normal(size=(16, 1)) / 4
rate, images = 0.3, 60

steps = 200
for _ in range(steps):
    x = rng.normal(3, 2, (images, 8))
    wanted = np.sin(x.sum(axis=1, keepdims=True) / 4)
    mine = np.array_split(np.arange(images), world.size)[world.rank]
    x, wanted = x[mine], wanted[mine]

    normalized = layer(x @ first)
    hidden = np.maximum(normalized, 0)
    error = hidden @ second - wanted

    d_output = 2 * error / images  # the loss is the mean over the batch of all ranks
    d_hidden = d_output @ second.T * (normalized > 0)
    d_first = x.T @ layer.backward(d_hidden)
    loss = total(float((error**2).sum()) / images)
    second -= rate * total(hidden.T @ d_output)
    first -= rate * total(d_first)
    layer.weight -= rate * total(layer.weight_grad)
    layer.bias -= rate * total(layer.bias_grad)

if world.rank == 0:
    print(f"loss after {steps} steps: {loss:.9f}")
