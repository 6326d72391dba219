"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input: a config value, a file, a folder, a missing program.

    The message is one sentence that names the culprit and the mend. Commands print it and exit with code 2 instead of
    showing a traceback.
    """
