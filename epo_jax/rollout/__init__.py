"""Episodes in, trajectories out: prompts, the turn scheduler, lanes of cache rows, the exchange between hosts, packing.

May import: common, settings, parallel, objectives, models, envs.
"""
