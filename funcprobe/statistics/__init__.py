"""Estimates and their errors, computed from arrays. It knows no models."""
