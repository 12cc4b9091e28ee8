"""Inputs of the report from the scans themselves or from the model: baselines, slices, random weights."""
