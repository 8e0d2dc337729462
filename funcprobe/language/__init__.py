"""Tokens and models: batches, pure models, scores, objectives. Knows no updates."""
