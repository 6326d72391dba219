"""The arithmetic of the authors' released code."""
