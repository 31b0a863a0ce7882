"""States of layers."""

import numpy as np


def filled(layer, rng):
    """The layer, its state made of random numbers, the running matrix one of a covariance."""
    state = layer.state_dict()
    for name, array in state.items():
        if name == "running_matrix":
            half = rng.normal(size=array.shape)
            array[...] = half @ half.swapaxes(1, 2) + np.eye(array.shape[1])
        elif name != "num_batches_tracked":
            array[...] = rng.uniform(0.5, 2, array.shape)
    layer.load_state_dict(state)
    return layer
