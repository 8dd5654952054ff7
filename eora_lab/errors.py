"""The one error that users see: a sentence that says what is wrong and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class EoraLabError(ValueError):
    """A wrong input, a missing file or an unusable model. The command line prints it as one line."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Begin the message of an error raised within by what it is about, such as a layer."""
    try:
        yield
    except EoraLabError as error:
        raise EoraLabError(f"{what}: {error}") from error


def one_line(error: Exception) -> str:
    """The message of another library's error, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
