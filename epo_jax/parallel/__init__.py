"""The device mesh and the processes of a run on several hosts.

May import: common, settings.
"""
