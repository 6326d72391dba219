"""The reference implementation's arithmetic, fault for fault. No other room knows it.

May import: common, settings, parallel, objectives, models, envs, rollout, runs, training.
"""
