"""What runs have come to: their rows as measures, comparisons of methods, the report's page and figures.

May import: common, settings, runs.
"""
