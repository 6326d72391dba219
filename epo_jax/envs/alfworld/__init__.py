"""ALFWorld: the environment, its text engine, the generator of its games, its experts. Imports only common and envs."""
