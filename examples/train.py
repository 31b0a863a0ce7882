"""Train a small network with batch norm on scikit-learn's handwritten digits.

    python -m pip install scikit-learn && python examples/train.py

Batch norm, linear, batch norm, rectifier, linear; plain SGD on the cross entropy.
"""

import sys

import numpy as np

import bnfast

try:
    from sklearn.datasets import load_digits
except ImportError:
    sys.exit("scikit-learn has the digits, and is missing: python -m pip install scikit-learn")

rng = np.random.default_rng(0)
pixels, labels = load_digits(return_X_y=True)  # 1797 images of 64 pixels, each from 0 to 16
pixels, order = pixels.astype(np.float32), rng.permutation(len(pixels))
train, test = order[:1350], order[1350:]

inputs, hidden = bnfast.BatchNorm(64), bnfast.BatchNorm(128)
weight1 = rng.normal(0, 0.2, (64, 128)).astype(np.float32)  # batch norm has the bias
weight2 = rng.normal(0, 0.1, (128, 10)).astype(np.float32)

for epoch in range(1, 6):
    layers = inputs.train(), hidden.train()
    for batch in rng.permutation(train).reshape(-1, 50):
        x = inputs(pixels[batch])
        h = hidden(x @ weight1)
        a = np.maximum(h, 0)  # the rectifier
        scores = np.exp(a @ weight2)
        errors = scores / scores.sum(1, keepdims=True) - np.eye(10, dtype=np.float32)[labels[batch]]
        dscores = errors / 50
        dh = hidden.backward(dscores @ weight2.T * (h > 0))
        inputs.backward(dh @ weight1.T)
        weight1 -= 0.1 * (x.T @ dh)
        weight2 -= 0.1 * (a.T @ dscores)
        for layer in layers:
            layer.weight -= 0.1 * layer.weight_grad
            layer.bias -= 0.1 * layer.bias_grad

    for layer in layers:
        layer.eval()  # with the running statistics
    guesses = np.maximum(hidden(inputs(pixels[test]) @ weight1), 0) @ weight2
    accuracy = (guesses.argmax(1) == labels[test]).mean()
    print(f"epoch {epoch}: {accuracy:.1%} of the test images are right")
