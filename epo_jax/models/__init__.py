"""Decoder language models: parameters, caches, sampling, tokenizers, checkpoint formats. No objectives.

May import: common, settings, parallel.
"""
