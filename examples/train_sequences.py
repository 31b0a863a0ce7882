"""Train on sequences of different lengths in little memory, and see what each means gains.

    python -m pip install ml_dtypes && python examples/train_sequences.py

A small convolutional network with shortcuts tells three wave forms apart. It is trained five times:
with padding in the statistics; with `lengths=`; with ReLU and shortcut in the pass of batch norm;
with activations of 16 bits; and with checkpoints: of a segment of blocks only the input is kept,
and the rest is made again. What is kept for the backward pass is shown at its most.
"""

import sys

import numpy as np

import bnfast

try:
    from ml_dtypes import bfloat16
except ImportError:
    sys.exit("NumPy has no bfloat16 without ml_dtypes: python -m pip install ml_dtypes")

LONGEST, CHANNELS, BATCH, RATE = 64, 16, 50, np.float32(0.1)
WAVES = np.sin, lambda t: np.sign(np.sin(t)), lambda t: (t / np.pi) % 2 - 1


def kept_bytes(thing):
    """Return how many bytes of arrays it keeps alive, by way of attributes and containers."""
    found, waiting = {}, [thing]
    while waiting:
        thing = waiting.pop()
        while isinstance(thing, np.ndarray) and isinstance(thing.base, np.ndarray):
            thing = thing.base  # whose memory a view shows
        if id(thing) in found or isinstance(thing, type):
            continue
        found[id(thing)] = thing
        if isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple)):
            waiting += thing
        elif not isinstance(thing, np.ndarray):
            waiting += getattr(thing, "__dict__", {}).values()
    return sum(thing.nbytes for thing in found.values() if isinstance(thing, np.ndarray))


def sequences(rng, number):
    """Draw signals around 20, padded with zeros (N, L, 1), their lengths and their wave forms."""
    lengths, kinds = rng.integers(16, LONGEST + 1, number), rng.integers(0, len(WAVES), number)
    x = np.zeros((number, LONGEST, 1), np.float32)
    for row, length, kind in zip(x, lengths, kinds, strict=True):
        t = rng.uniform(0, 6) + np.arange(length) * 2 * np.pi / rng.uniform(8, 16)
        row[:length, 0] = 20 + WAVES[kind](t) + rng.normal(0, 0.6, length)
    return x, lengths, kinds


def patches(x):
    """Return three neighbouring positions side by side, zeros beyond the ends (N * L, 3 C)."""
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0))).astype(np.float32)
    parts = [padded[:, k : k + LONGEST] for k in range(3)]
    return np.concatenate(parts, 2).reshape(len(x) * LONGEST, -1)


class Block:
    """relu(batch_norm(convolution(x)) + x); without a shortcut where x has a single channel."""

    def __init__(self, rng, inputs, fused):
        self.adds, self.fused = inputs == CHANNELS, fused
        self.filters = rng.normal(0, inputs**-0.5, (3 * inputs, CHANNELS)).astype(np.float32)
        self.norm = bnfast.BatchNorm(CHANNELS, axis=-1, activation="relu" if fused else None)

    def forward(self, x, **how):
        """Return the output; lengths, and whether the call is made again, are for batch norm."""
        self.x, shortcut = x, x if self.adds else None
        y = (patches(x) @ self.filters).reshape(*x.shape[:2], -1).astype(x.dtype)
        if self.fused:
            return self.norm(y, shortcut, **how)
        y = self.norm(y, **how)
        y = y + shortcut if self.adds else y
        self.positive = y > 0
        return y * self.positive

    def backward(self, dy):
        """Take a step of SGD; return the gradient of x."""
        if self.fused:
            dy, dshortcut = self.norm.backward(dy) if self.adds else (self.norm.backward(dy), 0)
        else:
            dshortcut = dy * self.positive
            dy = self.norm.backward(dshortcut)
        flat = dy.reshape(-1, CHANNELS).astype(np.float32)
        parts = (flat @ self.filters.T).reshape(*dy.shape[:2], 3, -1)
        dx = parts[:, :, 1]
        dx[:, :-1] += parts[:, 1:, 0]
        dx[:, 1:] += parts[:, :-1, 2]
        self.filters -= RATE * (patches(self.x).T @ flat)
        self.norm.weight -= RATE * self.norm.weight_grad
        self.norm.bias -= RATE * self.norm.bias_grad
        self.release()
        return dx.astype(dy.dtype) + dshortcut if self.adds else dx

    def release(self):
        """Let go of what is kept for the backward pass."""
        self.x = self.positive = None
        self.norm.release()


class Network:
    """Batch norm of the signal, three segments of blocks, the mean of a sequence, a classifier."""

    def __init__(self, fused, checkpointed):
        rng, self.checkpointed = np.random.default_rng(0), checkpointed
        self.scale = bnfast.BatchNorm(1, affine=False, axis=-1)
        blocks = [Block(rng, CHANNELS if number else 1, fused) for number in range(9)]
        self.segments = [blocks[:3], blocks[3:6], blocks[6:]]
        self.weight = np.zeros((CHANNELS, len(WAVES)), np.float32)

    def forward(self, x, lengths, how):
        """Return the logits."""
        x, self.inputs = self.scale(x, **how), []
        self.scale.release()  # it has no parameters
        for segment in self.segments:
            self.inputs.append(x)
            for block in segment:
                x = block.forward(x, **how)
                if self.checkpointed:
                    block.release()
        shares = (np.arange(LONGEST) < lengths[:, None]) / lengths[:, None]
        self.shares = shares[..., None].astype(np.float32)
        self.means = (self.shares * x.astype(np.float32)).sum(1)
        return self.means @ self.weight

    def step(self, dlogits, dtype, how):
        """Take a step of SGD; return how many bytes were kept for it at most."""
        dy = (self.shares * (dlogits @ self.weight.T)[:, None]).astype(dtype)
        self.weight -= RATE * (self.means.T @ dlogits)
        most = kept_bytes(self)
        for segment in reversed(self.segments):
            x = self.inputs.pop()
            if self.checkpointed:
                for block in segment:
                    x = block.forward(x, recompute=True, **how)
            most = max(most, kept_bytes(self))
            for block in reversed(segment):
                dy = block.backward(dy)
        return most


def train(masked, fused, dtype, checkpointed):
    """Return the share of right answers to new sequences, and the most bytes kept of a batch."""
    rng, network, most = np.random.default_rng(1), Network(fused, checkpointed), 0
    x, lengths, kinds = sequences(rng, 2000)
    own = kept_bytes(network)
    for batch in np.concatenate([rng.permutation(len(x)) for _ in range(3)]).reshape(-1, BATCH):
        how = {"lengths": lengths[batch]} if masked else {}
        scores = np.exp(network.forward(x[batch].astype(dtype), lengths[batch], how))
        errors = scores / scores.sum(1, keepdims=True)
        errors[np.arange(BATCH), kinds[batch]] -= 1
        most = max(most, network.step(errors / np.float32(BATCH), dtype, how) - own)

    for norm in (network.scale, *(block.norm for part in network.segments for block in part)):
        norm.eval()
    x, lengths, kinds = sequences(rng, 500)
    how = {"lengths": lengths} if masked else {}
    guesses = network.forward(x.astype(dtype), lengths, how).argmax(1)
    return (guesses == kinds).mean(), most


for name, options in {
    "padding counts": (False, False, np.float32, False),
    "lengths=": (True, False, np.float32, False),
    "... and fused": (True, True, np.float32, False),
    "... and of 16 bits": (True, True, bfloat16, False),
    "... and checkpoints": (True, True, bfloat16, True),
}.items():
    right, kept = train(*options)
    print(f"{name:<20} {right:.1%} are right, {kept / 1e6:.2f} MB kept of a batch", flush=True)
