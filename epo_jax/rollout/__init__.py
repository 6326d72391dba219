"""Episodes in, trajectories out."""
