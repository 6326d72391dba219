"""ScienceWorld: the environment, its simulator in a Java process, gold episodes. Imports only common and envs."""
