"""The engines: they move scans through decode, extract and write, and yield receipts.

An engine knows nothing of CT, of the model or of the tables, and never commits.
"""
