"""Doors to other frameworks, one file each, which imports its framework when it is used.

`conventions` says what each framework calls the arrays of batch normalization, and what it means
by them.
"""
