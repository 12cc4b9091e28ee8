"""Made-up data for the demo, the benchmark and the tests: CT phantoms and a small VAE.

Nothing that reads real scans may depend on this package.
"""
