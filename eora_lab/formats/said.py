"""What a folder says of its weights, key by key: what may change their meaning is refused unless it is known."""

from collections.abc import Iterable
from typing import Any

from eora_lab.errors import WORDS, EoraLabError

NOT_MODELLED = " (activations not modelled)"  # ends `base` where those are quantised, too, when the model runs


class Said:
    """The keys of one object in a JSON file, and which of them were asked for. All errors are EoraLabErrors.

    where: what begins the name of a key in errors.
    """

    def __init__(self, data: object, where: str = ""):
        if not isinstance(data, dict):
            raise EoraLabError(f"{where.rstrip('.')} must be {WORDS[dict]}, not {data!r}")
        self._data, self._where, self._asked = data, where, set[str]()

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of that type; null is as good as no value."""
        self._asked.add(key)
        value = self._data.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise EoraLabError(f"{self._where}{key} must be {WORDS[kind]}, not {value!r}")
        return value.lower() if isinstance(value, str) else value

    def one_of(self, key: str, *known: Any, default: Any = None) -> Any:
        """One of these values."""
        self._asked.add(key)
        value = self._data.get(key)
        value = value.lower() if isinstance(value, str) else value
        for one in known:
            if type(one) is type(value) and (one.lower() if isinstance(one, str) else one) == value:
                return one
        if value is not None:
            raise EoraLabError(f"{self._where}{key} {value!r} is not read, only {' and '.join(map(str, known))}")
        return default

    def part(self, key: str) -> "Said | None":
        """An object within."""
        self._asked.add(key)
        value = self._data.get(key)
        return None if value is None else Said(value, f"{self._where}{key}.")

    def done(self, harmless: Iterable[str]) -> None:
        """Raise where a key says something that was neither asked for nor is harmless."""
        known = self._asked.union(harmless)
        for key, value in self._data.items():
            if key not in known and value not in (None, False, "", [], {}):
                raise EoraLabError(
                    f"{self._where}{key} ({value!r}) is not known here, and may change what the values mean: delete it "
                    "if it does not"
                )
