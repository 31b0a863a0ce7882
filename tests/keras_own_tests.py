"""Run Keras's own tests on stock Keras, then with bnfast in the place of what they test.

A program, for what it changes stays changed: ``python keras_own_tests.py ARGUMENTS...`` runs pytest
with these arguments three times, in one process, because Keras takes seconds to import. The last
line that it prints is JSON: for "stock", "patched" and "swapped" the exit status, how many tests
passed, and the functions of bnfast that were called.
"""

import functools
import json
import sys
import types

import pytest

import bnfast
from bnfast.integrations import keras as integration

COUNTED = ("batch_norm", "layer_norm", "group_norm", "rms_norm", "rms_norm_forward", "moments")


class Plugin:
    """What Keras's tests need of their conftest, which is not in the wheel; and what has passed."""

    def __init__(self):
        self.passed = 0

    def pytest_configure(self, config):
        for marker in ("requires_trainable_backend", "multi_device"):
            config.addinivalue_line("markers", f"{marker}: not with NumPy")

    def pytest_collection_modifyitems(self, items):
        for item in items:
            if item.get_closest_marker("requires_trainable_backend"):
                item.add_marker(pytest.mark.skip(reason="Keras cannot train on NumPy"))

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed


def count_calls(called):
    """Let functions of bnfast add their names to a set."""

    def counted(name, function):
        @functools.wraps(function)
        def call(*arguments, **keywords):
            result = function(*arguments, **keywords)
            called.add(name)
            return result

        return call

    for name in COUNTED:
        setattr(bnfast, name, counted(name, getattr(bnfast, name)))


def swap(kind):
    """Make the layers of a class what `accelerate` makes of them, before they are called."""
    theirs = kind.__call__

    @functools.wraps(theirs)
    def __call__(self, *arguments, **keywords):
        if not integration._reason_to_leave(self):
            self.call = types.MethodType(integration._CALLS[kind], self)
        return theirs(self, *arguments, **keywords)

    kind.__call__ = __call__


def main(arguments):
    called, outcomes = set(), {}
    count_calls(called)

    def run(way):
        called.clear()
        plugin = Plugin()
        status = pytest.main(arguments, plugins=[plugin])
        outcomes[way] = {"status": int(status), "passed": plugin.passed, "called": sorted(called)}

    run("stock")
    with integration.patched():
        run("patched")
    for kind in integration._CALLS:
        swap(kind)
    run("swapped")
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1:])
