"""A fuzzer of every public callable and layer, with definitions of its own: see ``run.py``."""
