"""``python -m bnfast stats``: statistics of files, read block by block.

`run.py` is the order of a run, `source.py` what it reads: arrays (`arrays.py`), images
(`images.py`) and saved statistics. Importing this package imports none of what the ``stats`` extra
brings.
"""
