"""The commands other than `extract` and `refresh`: one file per command of `featray`.

A command returns a result with a method `text`. `featray.cli` prints it; no command imports another command.
"""
