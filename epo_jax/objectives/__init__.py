"""Losses, advantages and entropy controls as pure functions of arrays. No models, no environments.

May import: common, settings, parallel.
"""
