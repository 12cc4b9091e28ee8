"""The command line: parse arguments, call one function, print its answer, and return the exit code.

No logic of a command belongs here. Each handler calls a function that Python programs can call too.
"""
