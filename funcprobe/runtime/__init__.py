"""Blocks in bounded memory: streamed, resumed, serialised and distributed."""
