"""Make synthetic data for the demo, the benchmark and the tests: CT phantoms and a small VAE.

Code that reads real scans must not import this package.
"""
