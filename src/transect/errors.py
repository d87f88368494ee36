"""The exceptions for input a person can correct."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was given, what is allowed and what to do."""


class NotAtHand(InputError):
    """Data that would be used if they were there; a suite goes on without them and says so."""


class Unsuitable(InputError):
    """A model that cannot be judged by data that others can, as these do not fit into it; a suite passes them over."""
