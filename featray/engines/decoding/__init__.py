"""Decode scans in worker processes, so that a crash or a hang costs only the scan that caused it.

Both engines decode with this package. It knows no Ray and no model.
"""
