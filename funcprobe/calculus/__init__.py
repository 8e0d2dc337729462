"""Functions of parameters along a line: trees, steps, sweeps, derivatives. It knows no models."""
