"""The output: two Delta tables, `features` and `scans`, as one consistent snapshot, and how to read them.

Only `featray.stages.commit` changes both tables. Nothing here knows CT or a model.
"""
