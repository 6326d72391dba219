"""Shared by every room: user errors, files and folders, random keys, stopping, unused token ids.

May import: nothing.
"""
