"""The presets that come with the package: `--config=alfworld:laptop` is the preset `laptop` of `alfworld.py`.

May import: common, settings.
"""
