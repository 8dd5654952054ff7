"""What was seen of a family of models, and the file that keeps it: data/measured/families.jsonl, a line a family."""

import json
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from docs.records import MEASURED
from eora_lab.environment import commit
from eora_lab.files import write_atomically

RECORD = MEASURED / "families.jsonl"
ENOUGH = 0.99  # share of the decoder's weights in matrices that is called all of them
WORDS = ("full", "partial", "no adapter", "wrong", "error", "refused", "not built")  # verdicts


def versions() -> dict[str, str]:
    """Those that a verdict depends on."""
    names = {"transformers": "transformers", "torch": "torch", "peft": "peft", "eora_lab": "eora-lab"}
    return {name: metadata.version(package) for name, package in names.items()}


@dataclass
class Family:
    """What was seen of one model type of a mapping. Errors of logits are relative squared ones, see `distance`."""

    mapping: str
    name: str
    versions: dict[str, str] = field(default_factory=versions)
    commit: str = field(default_factory=commit)
    model: str = ""  # its class in transformers
    decoder_only: bool = True  # neither a masked language model nor an encoder-decoder, as transformers says
    refused: str = ""  # why the package takes no such model
    not_built: str = ""  # why there is no small model to try
    errors: dict[str, str] = field(default_factory=dict)  # step -> what was raised there
    wrong: dict[str, str] = field(default_factory=dict)  # step -> what is not as it should be
    no_adapter: str = ""  # why there is none that peft takes
    logits: dict[str, list[float]] = field(default_factory=dict)  # compressor -> errors without and with EoRA
    coverage: float | None = None  # share of the decoder's weights in matrices that was compressed
    whole: bool = False  # whether that is the share at the size that the configuration has by default
    left: list[str] = field(default_factory=list)  # matrices of the decoder that stayed as they are
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """One of `WORDS`, the worst that holds."""
        for word, holds in (
            ("not built", self.not_built),
            ("refused", self.refused),
            ("error", self.errors),
            ("wrong", self.wrong),
            ("no adapter", self.no_adapter),
            ("partial", (self.coverage or 0.0) < ENOUGH),
        ):
            if holds:
                return word
        return "full"

    @property
    def reason(self) -> str:
        """Why the verdict is not better; empty for "full"."""
        steps = {"error": self.errors, "wrong": self.wrong}.get(self.verdict)
        if steps:
            return "; ".join(f"{step}: {text}" for step, text in steps.items())
        return self.not_built or self.refused or self.no_adapter

    def to_line(self) -> str:
        """One line of JSON, with the verdict for those who read the file."""
        return json.dumps({"verdict": self.verdict} | asdict(self))

    @classmethod
    def from_line(cls, line: str) -> "Family":
        """The inverse of `to_line`."""
        data = json.loads(line)
        data.pop("verdict")
        return cls(**data)


def read(path: Path = RECORD) -> dict[tuple[str, str], Family]:
    """(mapping, name) -> family; none where there is no file."""
    if not path.exists():
        return {}
    found = map(Family.from_line, path.read_text(encoding="utf-8").splitlines())
    return {(one.mapping, one.name): one for one in found}


def keep(family: Family, path: Path = RECORD) -> None:
    """Put a family into the file, in place of what it said before. A kill leaves the old file or the new one."""
    known = read(path) | {(family.mapping, family.name): family}
    lines = [known[key].to_line() for key in sorted(known)]
    write_atomically(path, lambda partial: partial.write_text("\n".join(lines) + "\n", encoding="utf-8"))
