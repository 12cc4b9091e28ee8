"""Everything that writes to a terminal: answers, progress, and the filter for native libraries."""
