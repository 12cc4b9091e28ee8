"""Measures of features that need no labels: pure functions of arrays."""
