"""Everything that writes to a terminal: answers, progress, and filtering the output of native libraries."""
