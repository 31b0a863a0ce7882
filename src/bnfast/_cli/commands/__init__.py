"""The commands: one module for each, which adds its arguments to a parser, and runs them.

Importing such a module imports none of what its command needs besides NumPy.
"""
