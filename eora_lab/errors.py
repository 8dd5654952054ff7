"""The one error that users see: a sentence that says what is wrong and what to do."""


class EoraLabError(ValueError):
    """A wrong input, a missing file or an unusable model. The command line prints it as one line."""
