"""``python -m bnfast bench``: bnfast and every rival that is installed, measured in one run.

`run.py` is the order of a run. Importing this package imports none of what the ``bench`` extra
brings: `workloads.py` and the formulas also serve the benchmarks that pytest runs.
"""
