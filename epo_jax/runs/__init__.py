"""The run folder: config, checkpoints, metrics, episodes to read, figures. Knows no training.

May import: common, settings, parallel, objectives, models, envs, rollout.
"""
