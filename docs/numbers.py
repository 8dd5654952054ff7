"""Check the measured numbers of README and guides against what their commands give: `python -m docs.numbers`.

    python -m docs.numbers                    by what is recorded, at once
    python -m docs.numbers --measure NAME     run this command of the texts first, and record what it prints
    python -m docs.numbers --measure          run all of them, hours

Every number belongs to a claim (`docs/claims.py`): words of the texts with the numbers in them, and how these follow
from a record (`docs/records.py`): cells and frames that figures are drawn from too, and what other commands printed,
in data/measured/readme.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.claims import CLAIMS, EXEMPT, Claim
from docs.records import MEASURED, PRINTED, READERS, ROOT

TEXTS = (ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md")))
RECORDS = MEASURED / "readme"
FIELD = re.compile(r"\{(:[^}]*)\}")
NUMBER = r"([-+]?\d+(?:\.\d+)?)"


@dataclass(frozen=True)
class Result:
    """A claim, what the texts say, and what its record says."""

    claim: Claim
    said: tuple[str, ...] | None  # None: no text has such words
    given: tuple[str, ...] | None  # None: nothing is recorded; "" for a number that is not judged

    @property
    def wrong(self) -> bool:
        """Whether a text says something else than the record."""
        if self.said is None or self.given is None:
            return self.said is None
        return any(given not in ("", said) for said, given in zip(self.said, self.given, strict=True))

    def __str__(self) -> str:
        words = FIELD.sub("_", self.claim.text)
        if self.said is None:
            return f"WRONG  no text says: {words}"
        if self.given is None:
            return f"?      {words}: {' '.join(self.said)}, not recorded: --measure {self.claim.record}"
        given = " ".join(given or said for said, given in zip(self.said, self.given, strict=True))
        if not self.wrong:
            return f"right  {words}: {given}, by {self.claim.record}"
        return f"WRONG  {words}: a text says {' '.join(self.said)}, {self.claim.record} gives {given}"


def folded(text: str) -> str:
    """Text without line ends and columns."""
    return " ".join(text.split())


def pattern(template: str) -> re.Pattern:
    """What finds a claim's words in a folded text, a group a number."""
    parts = FIELD.split(folded(template))[::2]
    return re.compile(NUMBER.join(map(re.escape, parts)))


def written() -> str:
    """README and guides."""
    return "\n\n".join(path.read_text(encoding="utf-8") for path in TEXTS)


def check(texts: str, records: Path = RECORDS) -> Iterator[Result]:
    """Every claim, wherever it stands, checked by what is recorded."""
    text = folded(texts)
    known: dict = {name: read() for name, read in READERS.items()}
    for name in PRINTED:
        path = records / f"{name}.txt"
        known[name] = path.read_text(encoding="utf-8") if path.exists() else None
    known["arithmetic"] = lambda template: tuple(map(float, pattern(template).search(text).groups()))
    for claim in CLAIMS:
        found, given = list(pattern(claim.text).finditer(text)), None
        if found and known[claim.record] is not None:
            numbers = claim.numbers(known[claim.record])
            formats = FIELD.findall(claim.text)
            given = tuple(
                "" if number is None else f"{number:{one[1:]}}" for one, number in zip(formats, numbers, strict=True)
            )
        yield from (Result(claim, one.groups(), given) for one in found)
        if not found:
            yield Result(claim, None, given)


def unclaimed(texts: str) -> list[str]:
    """Numbers with a decimal point that no claim has, each with the words before it."""
    text = folded(texts)
    known = [
        found.span(n + 1)
        for one in CLAIMS
        for found in pattern(one.text).finditer(text)
        for n in range(found.re.groups)
    ]
    known += [found.span() for words in EXEMPT for found in re.finditer(words, text)]
    numbers = [found.span() for found in re.finditer(r"\d+\.\d+", text)]
    return [text[max(0, a - 40) : b] for a, b in numbers if not any(start <= a and b <= end for start, end in known)]


def command(texts: str, name: str) -> list[str]:
    """The arguments of the command that a record comes from, as it stands in the texts."""
    begins, *changes = PRINTED[name]
    shown = re.sub(r"\\\n\s*", " ", texts)
    for line in re.findall(r"`(eora-lab [^`]*)`|^    (?:\S+=\S+ )?\.venv/bin/(eora-lab .*)$", shown, re.M):
        line = folded("".join(line).partition("#")[0])
        if line.startswith(begins):
            for old, new in changes:
                assert old in line, f"{old!r} is not in {line!r}"
                line = line.replace(old, new)
            return shlex.split(line)[1:]
    raise SystemExit(f"no text has a command that begins with {begins!r}")


def measure(name: str, arguments: list[str]) -> None:
    """Run a command and keep what it prints."""
    print(f"{name}: eora-lab {shlex.join(arguments)}", flush=True)
    run = [sys.executable, "-m", "eora_lab.cli", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        printed = subprocess.run(run, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{name}.txt").write_text(printed, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 1 when a number is wrong."""
    parser = argparse.ArgumentParser(prog="python -m docs.numbers", description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", nargs="*", metavar="NAME", choices=PRINTED, help=", ".join(PRINTED))
    asked, texts = parser.parse_args(arguments), written()
    for name in [] if asked.measure is None else asked.measure or PRINTED:
        measure(name, command(texts, name))
    results = list(check(texts))
    print(*results, *(f"WRONG  no claim has it: {words}" for words in unclaimed(texts)), sep="\n")
    return any(one.wrong for one in results) or bool(unclaimed(texts))


if __name__ == "__main__":
    sys.exit(main())
