"""bnfast within other libraries: one module for each, imported by whoever wants it, by name."""
