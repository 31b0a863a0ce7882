"""Take a layer of a PyTorch network to bnfast, train them there, and bring their state back.

python -m pip install torch && python examples/load_pytorch_state.py
"""

import sys

import numpy as np

import bnfast

try:
    import torch
except ModuleNotFoundError:
    sys.exit("PyTorch is not installed: nothing to load from")

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16))
network(torch.randn(8, 3, 10, 10))  # a training step: its running statistics are no longer 0 and 1
module = network[1]

layer = bnfast.BatchNorm.from_torch(module)


def largest_difference(x):
    """Compare the outputs of module and layer, in the mode that both are in."""
    with torch.no_grad():
        return np.abs(layer(x) - module(torch.from_numpy(x)).numpy()).max()


x = np.random.default_rng(0).normal(1, 3, (8, 16, 10, 10)).astype(np.float32)
print(f"training, largest difference: {largest_difference(x):.0e}")
layer(x)  # one batch more than the module has seen
state = {name: torch.as_tensor(array) for name, array in layer.state_dict().items()}
module.load_state_dict(state)

layer.eval()
module.eval()
print(f"inference, largest difference: {largest_difference(x):.0e}")
print(f"batches that both have seen: {int(module.num_batches_tracked)}")
