"""The one family of errors that fasttower raises on purpose."""


class FastTowerError(Exception):
    """Bad input, a bad flag, or something that this machine cannot do.

    The message is one line: what was found, what was expected, what to do. The command line prints it
    without a traceback and exits with 2.
    """


class TrainingError(FastTowerError):
    """Training itself went wrong (a loss that is not finite); the command line exits with 3."""
