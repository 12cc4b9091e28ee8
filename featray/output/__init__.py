"""The output: the Delta tables `features` and `scans` as consistent snapshots, the lease, and reading.

Only `featray.stages.commit` changes the tables. This package does not know CT scans or models.
"""
