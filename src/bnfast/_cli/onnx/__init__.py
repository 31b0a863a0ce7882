"""The commands on ONNX models: ``python -m bnfast fold``, ``inspect`` and ``recalibrate``.

`model_file.py` reads, checks and writes models, `graph.py` is what their nodes are looked up and
changed in, `inference.py` runs them in onnxruntime. `layers.py` finds the normalization layers of a
model, `part.py` runs the part that leads to some of them, with what `data.py` reads. Importing this
package imports none of what the ``onnx`` extra brings.
"""
