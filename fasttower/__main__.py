"""`python -m fasttower COMMAND` is the same as `fasttower COMMAND`."""

from fasttower.cli import script

script()
