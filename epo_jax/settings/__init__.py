"""Every setting of a run: default, meaning, range or choices, and what a sweep may vary.

May import: common.
"""
