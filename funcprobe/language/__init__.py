"""Tokens and models: batches, pure models, scores, objectives. It knows nothing of updates."""
