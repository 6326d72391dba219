"""Every setting of a run, declared once in `table`, and what is made from the table.

`config` (the ml_collections config), `validate`, `flags` (the command line), `hyper` (coefficients and choices of the
objectives), `sweep` (what a sweep may vary), `describe` (docs/settings.md and --help).

May import: common.
"""
