"""The one exception for input a person can correct."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was given, what is allowed and what to do."""
