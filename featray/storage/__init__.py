"""All access to storage: files on any fsspec file system, retries, URLs and storage options.

This package does not know the contents of the files.
"""
