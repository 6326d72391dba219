"""What ends a command without a traceback."""


class UserError(Exception):
    """Bad input: a config value, a file, a folder, a missing program.

    The message is one sentence that names the culprit and the mend. Commands print it and exit with code 2 instead of
    showing a traceback.
    """


class Stopped(Exception):
    """The run was asked to stop, has saved all it needs, and can be resumed. Commands print it and exit with code 75."""
