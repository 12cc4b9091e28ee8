"""`python -m featray` is `featray`."""

from featray.cli import console

console()
