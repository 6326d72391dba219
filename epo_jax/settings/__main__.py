"""Prints docs/settings.md."""

from epo_jax.settings.describe import markdown

print(markdown(), end="")
