"""What frameworks call the arrays of batch normalization, and what they mean by its arguments.

What they call their layers, too, and the attributes of these.

Uses nothing of bnfast and imports no framework, so that every room may read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True)
class Convention:
    """Batch normalization as a framework has it.

    Attributes
    ----------
    weight, bias, mean, var : str
        The names of the parameters and of the running statistics.
    counter : str
        The name of the number of batches seen; empty where the framework counts none.
    momentum : float
        The framework's default.
    momentum_of_new : bool
        Whether `momentum` is the weight of the new batch, rather than of the old statistics.
    unbiased : bool
        Whether the running variance divides by M - 1, rather than by M.
    eps : float
        The framework's default.
    axis : int
        The channel axis by default.
    """

    weight: str
    bias: str
    mean: str
    var: str
    counter: str
    momentum: float
    momentum_of_new: bool
    unbiased: bool
    eps: float
    axis: int

    def weight_of_new_batch(self, momentum: float) -> float:
        """Return the momentum of bnfast, which is of the new batch, for one of the framework.

        Parameters
        ----------
        momentum : float
            As the framework means it.

        Returns
        -------
        float

        Examples
        --------
        >>> from bnfast._conventions import KERAS, PYTORCH
        >>> KERAS.weight_of_new_batch(0.75), PYTORCH.weight_of_new_batch(0.75)
        (0.25, 0.75)
        """
        if self.momentum_of_new:
            return momentum
        # Of the decimals as they are written: 1.0 - 0.99 is 0.010000000000000009.
        return float(1 - Decimal(repr(float(momentum))))


@dataclass(frozen=True)
class LayerClasses:
    """The normalization layers of a framework, whose attributes are read by these names.

    Attributes
    ----------
    framework : str
        What messages call it.
    convention : Convention
        The names of parameters and statistics, and what momentum means.
    homes : tuple of str
        How the modules begin in which the framework defines these classes.
    method : str
        What computes in them.
    taken_by : str
        The class method of bnfast's layers that takes one of them.
    eps, rms_weight : str
        The attribute that is added to the variance; the weight of an RMS normalization.
    classes : mapping of str to tuple of str
        By the name of a layer of bnfast, those that compute the same.
    """

    framework: str
    convention: Convention
    homes: tuple[str, ...]
    method: str
    taken_by: str
    eps: str
    rms_weight: str
    classes: Mapping[str, tuple[str, ...]]


# https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
PYTORCH = Convention(
    weight="weight",
    bias="bias",
    mean="running_mean",
    var="running_var",
    counter="num_batches_tracked",
    momentum=0.1,
    momentum_of_new=True,
    unbiased=True,
    eps=1e-5,
    axis=1,
)

# https://docs.pytorch.org/docs/stable/nn.html#normalization-layers
PYTORCH_LAYERS = LayerClasses(
    framework="PyTorch",
    convention=PYTORCH,
    homes=("torch.nn.",),
    method="forward",
    taken_by="from_torch",
    eps="eps",
    rms_weight="weight",
    classes={
        "BatchNorm": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
        "InstanceNorm": ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
        "GroupNorm": ("GroupNorm",),
        "LayerNorm": ("LayerNorm",),
        "RMSNorm": ("RMSNorm",),
    },
)

# https://keras.io/api/layers/normalization_layers/batch_normalization/
KERAS = Convention(
    weight="gamma",
    bias="beta",
    mean="moving_mean",
    var="moving_variance",
    counter="",
    momentum=0.99,
    momentum_of_new=False,
    unbiased=False,
    eps=1e-3,
    axis=-1,
)

# https://keras.io/api/layers/normalization_layers/
KERAS_LAYERS = LayerClasses(
    framework="Keras",
    convention=KERAS,
    homes=("keras.", "tf_keras.", "tensorflow."),
    method="call",
    taken_by="from_keras",
    eps="epsilon",
    rms_weight="scale",
    classes={
        "BatchNorm": ("BatchNormalization",),
        "InstanceNorm": ("GroupNormalization",),
        "GroupNorm": ("GroupNormalization",),
        "LayerNorm": ("LayerNormalization",),
        "RMSNorm": ("RMSNormalization",),
    },
)

# https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/normalization.html
FLAX = Convention(
    weight="scale",
    bias="bias",
    mean="mean",
    var="var",
    counter="",
    momentum=0.99,
    momentum_of_new=False,
    unbiased=False,
    eps=1e-5,
    axis=-1,
)

# https://onnx.ai/onnx/operators/onnx__BatchNormalization.html, version 15: the names of its inputs
ONNX = Convention(
    weight="scale",
    bias="B",
    mean="input_mean",
    var="input_var",
    counter="",
    momentum=0.9,
    momentum_of_new=False,
    unbiased=False,
    eps=1e-5,
    axis=1,
)
