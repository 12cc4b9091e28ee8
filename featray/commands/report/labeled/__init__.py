"""Measures of features against labels and facts of the header: pure functions of arrays."""
