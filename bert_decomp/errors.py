"""The one exception that means "the user can mend this": its text is the whole message, on one line."""


class UserError(Exception):
    """Bad input. The text says what is wrong and what to do; the command line prints it and exits with code 2."""
