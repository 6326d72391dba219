"""ALFWorld: the environment, a fast text engine, a generator of games, experts.

May import: common, envs.
"""
