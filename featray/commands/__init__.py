"""The commands that are not a run: each file answers one command of `featray`.

A command returns a result with a `text` method; printing it belongs to `featray.cli`.
"""
