"""A plugin of pytest, for Keras's own tests: with bnfast in the place of what they test, or not.

KERAS_TESTS_THROUGH says what they run through: "stock", "patched" or "swapped".
"""

import functools
import json
import os
import types
from collections import Counter

import pytest

import bnfast
from bnfast.integrations import keras as integration

THROUGH = os.environ["KERAS_TESTS_THROUGH"]
calls = Counter()


def counted(name):
    function = getattr(bnfast, name)

    @functools.wraps(function)
    def call(*arguments, **keywords):
        result = function(*arguments, **keywords)
        calls[name] += 1
        return result

    return call


def swap_every(kind):
    """Make the layers of a class what `accelerate` makes of them, before they are called."""
    theirs = kind.__call__

    @functools.wraps(theirs)
    def __call__(self, *arguments, **keywords):
        if not integration._reason_to_leave(self):
            self.call = types.MethodType(integration._CALLS[kind], self)
        return theirs(self, *arguments, **keywords)

    kind.__call__ = __call__


def pytest_configure(config):
    # What the tests' own conftest, which is not in the wheel, says of these.
    for marker in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{marker}: not with NumPy")
    for name in ("batch_norm", "layer_norm", "group_norm", "rms_norm", "moments"):
        setattr(bnfast, name, counted(name))
    bnfast.rms_norm_forward = counted("rms_norm_forward")
    if THROUGH == "patched":
        patch = integration.patched()
        patch.__enter__()
        config.add_cleanup(lambda: patch.__exit__(None, None, None))
    if THROUGH == "swapped":
        for kind in integration._CALLS:
            swap_every(kind)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("requires_trainable_backend"):
            item.add_marker(pytest.mark.skip(reason="Keras cannot train on NumPy"))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"bnfast calls: {json.dumps(calls)}")
