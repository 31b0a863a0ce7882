"""Adapt a trained network to shifted data: see the mismatch, recalibrate, adapt to single batches.

    python -m pip install scikit-learn && python examples/adapt_to_shift.py [drift.png]
    (the picture needs matplotlib)

A small convolutional network learns scikit-learn's handwritten digits. Then the images come from a
worse camera: darker, with little contrast, and noisy. No weight changes, and no label is needed.
"""

import sys

import numpy as np

import bnfast

try:
    from bnfast._cli.digits import Network, Normalization, load
except ImportError:
    sys.exit("scikit-learn has the digits, and is missing: python -m pip install scikit-learn")

rng = np.random.default_rng(0)
digits = load()
network = Network(0, lambda channels: Normalization(bnfast.BatchNorm(channels, axis=-1)))
for _ in network.train(digits, epochs=4, batch_size=64, learning_rate=0.1, seed=0):
    pass
layers = {f"norm {k}": stage.layer for k, stage in enumerate(network.normalizations, 1)}
for layer in layers.values():
    layer.eval()


def shifted(images):
    """Darker, of less contrast, and noisy."""
    return (0.4 * images - 0.3 + rng.normal(0, 0.05, images.shape)).astype(np.float32)


labels, batches = digits.test_labels, range(0, len(digits.test_images), 64)
clean, dark = digits.test_images, shifted(digits.test_images)
unlabelled = shifted(digits.images)


def guesses(images):
    """Evaluate in batches of 64."""
    return np.concatenate([network.forward(images[k : k + 64]).argmax(1) for k in batches])


def show(what, answers):
    """Print the share of right ones."""
    print(f"{what:<45} {(answers == labels).mean():.1%} of the test images are right")


show("images as in training:", guesses(clean))

with bnfast.monitoring(layers) as report:
    show("shifted images:", guesses(dark))
print(report)
if len(sys.argv) > 1:
    report.plot(sys.argv[1])

# Test-time adaptation: every batch by statistics that are partly its own.
adapted = []
for start in batches:
    kept = [layer.state_dict() for layer in layers.values()]
    with bnfast.recalibrating(layers, prior=16):
        adapted.append(network.forward(dark[start : start + 64]).argmax(1))
    for layer, state in zip(layers.values(), kept, strict=True):
        layer.load_state_dict(state)  # every batch on its own
show("... adapted to each batch, with a prior of 16:", np.concatenate(adapted))

# Recalibration: the statistics of many images that nobody has labelled.
with bnfast.recalibrating(layers):
    for start in range(0, len(unlabelled), 64):
        network.forward(unlabelled[start : start + 64])
show("... after recalibration:", guesses(dark))
