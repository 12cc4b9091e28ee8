"""`python -m featray` is `featray`."""

from featray.cli.main import console

console()
