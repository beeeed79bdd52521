"""Completions of a problem from a model: drawing them, decoding them, and where they end."""
