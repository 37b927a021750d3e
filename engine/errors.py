"""The one exception that reaches a user: a sentence that says what was given, what is allowed and what to do."""


class UserError(Exception):
    """Bad input. `engine.train` prints its one sentence without a traceback and exits with status 2."""
