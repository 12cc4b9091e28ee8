"""Access storage: files on any fsspec file system, retries, URLs and storage options.

This package must not know the contents of the files.
"""
