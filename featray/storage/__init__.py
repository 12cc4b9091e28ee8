"""The one place that touches storage: files on any fsspec file system, retries, URLs and options.

Nothing here knows what a file means.
"""
