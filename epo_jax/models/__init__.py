"""Decoder language models: parameters, caches, tokens. Knows nothing of objectives or environments."""
