"""Text environments in host-side worker processes. Nothing here may import JAX."""
