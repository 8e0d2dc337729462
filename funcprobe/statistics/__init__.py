"""Estimates and their errors from arrays. Sees no model."""
