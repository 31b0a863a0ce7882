"""The commands on ONNX models: ``python -m bnfast fold``, ``inspect`` and ``recalibrate``.

`model_file.py` reads, checks and writes models, `graph.py` is what their nodes are looked up and
changed in, `inference.py` runs them in onnxruntime. `layers.py` finds the normalization layers of a
model, `part.py` cuts out the part that leads to some of them, `data.py` reads the samples for it.
Importing this package imports none of what the ``onnx`` extra brings.
"""
