"""The train step, the optimizer, the warm start and the loop around them.

May import: common, settings, parallel, objectives, models, envs, rollout, runs.
"""
