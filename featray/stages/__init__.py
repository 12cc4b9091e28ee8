"""The stages of the pipeline, one public callable per file; none imports another or knows their order."""
