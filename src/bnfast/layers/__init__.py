"""Objects that own parameters and running statistics, one file per kind."""

from bnfast.layers.batch import BatchNorm

__all__ = ["BatchNorm"]
