"""Functions of parameters along a line: trees, steps, sweeps, derivatives. Knows no tokens."""
