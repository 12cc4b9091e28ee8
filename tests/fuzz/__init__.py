"""Small scans of every format whose files are damaged at random."""
