"""The commands on ONNX models: ``python -m bnfast fold``.

`model_file.py` reads, checks and writes models, `graph.py` is what their nodes are looked up and
changed in, `inference.py` runs them in onnxruntime. Importing this package imports none of what the
``onnx`` extra brings.
"""
