"""bnfast within other libraries: one module for each, imported by whoever wants it, by name.

`autograd`, `dask`, `keras`, `onnx`, `sklearn`, `thinc` and `torch`::

    from bnfast.integrations.torch import accelerate
"""
