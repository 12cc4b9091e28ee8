"""Runs of featray whose processes are killed, and decoders and models that kill the process they run in."""
