"""The errors that are the caller's to fix; the command line turns each into one sentence."""


class InputError(ValueError):
    """An argument or a file that breaks a rule; says the rule, what came, and the remedy."""


class ModelError(InputError):
    """A model that cannot be loaded or that the toolkit does not know how to drive."""
