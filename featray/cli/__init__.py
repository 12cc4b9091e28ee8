"""The command line: parse arguments, call one function, print its answer, and return the exit code.

No logic of a command belongs here; each command is a function of `featray.commands` or `featray.pipeline`.
"""
