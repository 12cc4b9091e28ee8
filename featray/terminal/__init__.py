"""Terminal output: answers, progress, commands to copy, and a filter for the output of native libraries."""
