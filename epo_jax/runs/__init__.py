"""The run folder: config, checkpoints, metrics, episodes to read."""
