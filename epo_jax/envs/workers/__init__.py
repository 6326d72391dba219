"""Environments in worker processes: the pool of episodes and both ends of a process. Imports only common and envs.base."""
