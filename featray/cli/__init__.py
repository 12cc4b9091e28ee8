"""The command line: parse arguments, call one function, print its answer, return the exit code.

No logic of a command belongs here; each command is a function of `featray.commands` or `featray.pipeline`.
"""
