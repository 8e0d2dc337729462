"""Transforms of unmodified functions: exact increments, power series, nested forward mode."""
