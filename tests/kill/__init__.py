"""Processes that die: stand-ins for decoders and models that kill them, and runs that are killed."""
