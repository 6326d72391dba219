"""Text games, played in host-side worker processes. No module here imports JAX, directly or through another one.

May import: common.
"""
