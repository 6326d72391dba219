"""Episodes in, trajectories out: prompts, the turn scheduler, lanes of cache rows.

May import: common, settings, parallel, objectives, models, envs.
"""
