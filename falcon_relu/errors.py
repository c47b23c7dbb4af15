"""The error that a user can act on."""


class FalconError(Exception):
    """Something outside the code is wrong: a file, a setting, the machine.

    The message names what was wrong, where, and what to do. Commands print it without a traceback and exit with 1.
    """
