"""All access to storage: files on any fsspec file system, retries, URLs and storage options.

This package does not know what the files contain.
"""
