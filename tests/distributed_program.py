"""What a rank does in ``test_distributed_processes.py``: ``program.py TRANSPORT SCENARIO...``."""

import copy
import os
import signal
import sys
import time
from datetime import timedelta

import numpy as np

import bnfast
from bnfast.distributed import MPICommunicator, SyncBatchNorm, TorchCommunicator

BOUND = 1e-12


# Seconds for one exchange: few where one is to go unanswered.
TIMEOUT = {"leave": 5.0, "evaluate": 5.0}


def communicator_of(transport, timeout):
    if transport == "mpi":
        from mpi4py import MPI

        return MPICommunicator(MPI.COMM_WORLD, timeout=timeout)
    import torch.distributed

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['MEETING']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout),
    )
    return TorchCommunicator()


def batch_of(rank, size, step):
    """The part of a rank, the joined batch, and both gradients: the last rank has nothing."""
    rng = np.random.default_rng(step)
    counts = [3 + 2 * k for k in range(size - 1)] + [0]
    x, dy = rng.normal(1e3, 2, (2, sum(counts), 40, 5, 3))
    begin = sum(counts[:rank])
    mine = slice(begin, begin + counts[rank])
    return mine, x, dy


def layers(communicator):
    return SyncBatchNorm(40, communicator, dtype=np.float64), bnfast.BatchNorm(40, dtype=np.float64)


def steps(communicator):
    """All ranks make what one process makes of the joined batch."""
    own, whole = layers(communicator)
    for step in range(4):
        mine, x, dy = batch_of(communicator.rank, communicator.size, step)
        np.testing.assert_allclose(own(x[mine]), whole(x)[mine], rtol=0, atol=BOUND * 4)
        np.testing.assert_allclose(
            own.backward(dy[mine]), whole.backward(dy)[mine], rtol=0, atol=BOUND * 1e3
        )
        for got, wanted in (
            (own.running_mean, whole.running_mean),
            (own.running_var, whole.running_var),
        ):
            np.testing.assert_allclose(got, wanted, rtol=BOUND)
    state = np.concatenate([own.running_mean, own.running_var]).view(np.uint8)
    states = communicator.allgather(state)
    np.testing.assert_array_equal(states, np.broadcast_to(state, states.shape))


def differ(communicator):
    """Another number of channels on one rank is an error on all, and so is another dtype."""
    last = communicator.rank == communicator.size - 1
    for x in (
        np.ones((4, 2000 if last else 3)),
        np.ones((4, 3), np.float64 if last else np.float32),
    ):
        layer = SyncBatchNorm(x.shape[1], communicator)
        try:
            layer(x)
        except ValueError as error:
            assert "the ranks must agree, but differ in " in str(error)
            assert f"rank {communicator.size - 1}" in str(error)
            np.testing.assert_array_equal(layer.running_mean, 0)
        else:
            raise AssertionError("no error")


def fail(communicator):
    """Bad input on one rank is an error on all, and the next step is none."""
    own, _ = layers(communicator)
    _, x, _ = batch_of(0, 2, 0)
    try:
        own(x[:, :7] if communicator.rank == 1 else x)
    except (RuntimeError, ValueError) as error:
        expected = "x must have 40 channels"
        if communicator.rank != 1:
            expected = f"rank 1 failed: ValueError: {expected}"
        assert str(error).startswith(expected)
    else:
        raise AssertionError("no error")
    own(x)


def die(communicator):
    own, _ = layers(communicator)
    _, x, _ = batch_of(0, 2, 0)
    own(x)
    if communicator.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    own(x)


def leave(communicator):
    """Rank 1 ends by an error of its own program."""
    own, _ = layers(communicator)
    _, x, _ = batch_of(0, 2, 0)
    own(x)
    if communicator.rank == 1:
        raise KeyError("an error of the program")
    own(x)


def evaluate(communicator):
    """Rank 1 has its layer in evaluation, and nothing more to exchange."""
    own, _ = layers(communicator)
    _, x, _ = batch_of(0, 2, 0)
    own(x)
    own.train(communicator.rank != 1)
    own(x)
    if communicator.rank == 1:
        time.sleep(TIMEOUT["evaluate"] + 2)


def module(communicator):
    """PyTorch's module, in a model whose gradients DistributedDataParallel averages."""
    import torch

    from bnfast.integrations.torch import SyncBatchNorm

    torch.manual_seed(0)
    nn = torch.nn
    whole = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()
    own = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole), torch.distributed.new_group())
    own = nn.parallel.DistributedDataParallel(own)
    rank, size = communicator.rank, communicator.size
    for _ in range(3):
        x = torch.randn(size * 6, 5, dtype=torch.float64)
        for model, part in ((whole, x), (own, x[rank * 6 : rank * 6 + 6])):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            model(part).square().mean().backward()
            optimizer.step()
    for key, expected in whole.state_dict().items():
        np.testing.assert_allclose(
            own.module.state_dict()[key], expected, rtol=BOUND * 1e3, atol=BOUND
        )


def module_refuses(communicator):
    """What PyTorch's module refuses on one rank is an error on all, and counts as no batch."""
    import torch

    from bnfast.integrations.torch import SyncBatchNorm

    last = communicator.rank == communicator.size - 1
    layer = SyncBatchNorm(3, process_group=communicator)
    try:
        layer(torch.ones(4, 3, dtype=torch.bfloat16 if last else torch.float32))
    except (TypeError, RuntimeError) as error:
        assert isinstance(error, TypeError) == last
        assert "expected a float32 or float64 input" in str(error)
    else:
        raise AssertionError
    assert layer.num_batches_tracked == 0


def main():
    transport, *scenarios = sys.argv[1:]
    communicator = communicator_of(transport, min(TIMEOUT.get(name, 60.0) for name in scenarios))
    for name in scenarios:
        globals()[name](communicator)
        sys.stdout.write(f"done {name}, rank {communicator.rank}\n")
    if transport == "gloo":
        import torch.distributed

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
