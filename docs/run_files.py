"""Which files of two run folders differ, beside what runs of the same settings always differ in."""

import hashlib
import json
from pathlib import Path

# begin keys of what runs differ in: times, memory, and checksums over them
DIFFERS = ("seconds", "steps", "peak_memory", "own_memory", "needed_memory", "sha256")


def differing(one: Path, other: Path) -> list[str]:
    """Files that are in one of two run folders alone, or not the same in both."""
    first, second = contents(one), contents(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def contents(folder: Path) -> dict[str, object]:
    """Relative path -> what is in a file, large parts as their digests, but for what runs differ in."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            said: object = None
            with open(path, "rb") as file:
                if path.name == "report.json":
                    said = lasting(json.loads(file.read()))
                elif path.parent.name == "blocks" and path.suffix == ".safetensors":
                    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                    layers = json.loads(header["__metadata__"].pop("layers"))
                    said = lasting(header), lasting(layers)
                rest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(folder))] = said, rest
    return found


def lasting(value: object) -> object:
    """A JSON value without what runs differ in."""
    if isinstance(value, dict):
        return {key: lasting(one) for key, one in value.items() if not key.startswith(DIFFERS)}
    return [lasting(one) for one in value] if isinstance(value, list) else value
