"""Batches of responses, from disk and from the policy."""
