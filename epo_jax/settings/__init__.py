"""Every setting: default, meaning, range."""
