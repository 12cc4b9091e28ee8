"""Run the `featray` command for `python -m featray`."""

from featray.cli.main import console

console()
