"""Episodes in worker processes: the pool and both ends of a process's pipes.

May import: common, envs.
"""
