"""ScienceWorld: the environment, the simulator in a Java process, gold episodes.

May import: common, envs.
"""
