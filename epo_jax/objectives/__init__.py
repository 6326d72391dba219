"""Losses and advantages as pure functions of arrays. Knows nothing of models or environments."""
