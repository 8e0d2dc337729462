"""The language-model head in slices of the vocabulary, recomputed in reverse mode."""
