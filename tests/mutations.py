"""Seeded damage to files, each with a note of what was done: JSON, tensors, texts, and any file at all."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pandas
import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass(frozen=True)
class Change:
    """What was done, and where: a file or an option, and the key, tensor or value in it."""

    what: str
    file: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.place}".strip() + f" in {self.file}"


def mutate_file(path: Path, random: Random) -> Change:
    """Change one file: by its structure mostly, else as any file."""
    by_structure = {".json": mutate_json, ".safetensors": mutate_tensors}.get(path.suffix)
    return by_structure(path, random) if by_structure and random.random() < 0.8 else mutate_bytes(path, random)


# --- JSON ----------------------------------------------------------------------------------------------------------

VALUES: dict[str, Callable[[Any], Any]] = {
    "null": lambda _: None,
    "list": lambda value: [value],
    "mapping": lambda value: {"value": value},
    "word": lambda _: "fox",
    "text": str,
    "nothing": lambda _: "",
    "flag": lambda _: True,
    "zero": lambda _: 0,
    "negative": lambda value: -value if number(value) and value > 0 else -1,
    "huge": lambda value: 1e300 if isinstance(value, float) else 2**40,
    "nan": lambda _: math.nan,
    "fraction": lambda value: value + 0.5 if number(value) else 0.5,
    "twice": lambda value: 2 * value if number(value) else 2,
    "negation": lambda value: not value,
}
KEYS = ("remove", "misspell", "stranger")


def number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mutate_json(path: Path, random: Random) -> Change:
    """Remove, misspell, add or change one value of a JSON file, or make it another kind of JSON."""
    text, place = mutate_json_text(path.read_text(encoding="utf-8"), random)
    path.write_text(text, encoding="utf-8")
    what, _, place = place.partition(" ")
    return Change(what, path.name, place)


def mutate_json_text(text: str, random: Random) -> tuple[str, str]:
    """(JSON with one change, what was done to which place)."""
    data = json.loads(text)
    if random.random() < 0.06 or not isinstance(data, dict | list) or not data:
        whole = random.choice(([], None, 3, "fox", [data], {}))
        return json.dumps(whole), f"whole {json.dumps(whole)[:9]}"
    owner, key, place = data, None, []
    while True:  # a step down at a time: what stands at the top is met as often as all that is below it
        keys = list(owner) if isinstance(owner, dict) else range(len(owner))
        key = random.choice(keys)
        place.append(str(key))
        below = owner[key]
        if not (isinstance(below, dict | list) and below) or random.random() < 0.3:
            break
        owner = below
    what = random.choice((*KEYS[:2], *VALUES) if isinstance(owner, list) else (*KEYS, *KEYS, *VALUES))
    if what == "remove":
        del owner[key]
    elif what == "misspell" and isinstance(owner, dict):
        owner[misspelt(key)] = owner.pop(key)
    elif what == "stranger":
        owner["stranger"] = 1
    else:
        owner[key] = VALUES.get(what, VALUES["null"])(owner[key])
    return json.dumps(data, indent=1), f"{what} {'.'.join(place)}"


def misspelt(word: str) -> str:
    return word + word[-1:] if len(word) < 3 else word[:-2] + word[-1] + word[-2]


# --- tensors -------------------------------------------------------------------------------------------------------


def shuffled(tensor: torch.Tensor, random: Random) -> torch.Tensor:
    return tensor[random.sample(range(len(tensor)), len(tensor))]


def filled(value: float) -> Callable:
    def fill(tensor: torch.Tensor, random: Random) -> torch.Tensor:
        tensor = tensor.clone() if tensor.is_floating_point() or math.isfinite(value) else tensor.float()
        tensor.view(-1)[random.randrange(tensor.numel())] = value
        return tensor

    return fill


def flipped(tensor: torch.Tensor, random: Random) -> torch.Tensor:
    raw = tensor.clone().view(-1).view(torch.uint8)
    raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    return raw.view(tensor.dtype).view(tensor.shape)


def to(dtype: torch.dtype) -> Callable:
    return lambda tensor, _: tensor.to(dtype)


TENSORS: dict[str, Callable[[torch.Tensor, Random], torch.Tensor]] = {
    "nan": filled(math.nan),
    "inf": filled(math.inf),
    "zero": lambda tensor, _: torch.zeros_like(tensor),
    "flip": flipped,
    "permute": shuffled,
    "transpose": lambda tensor, _: tensor.permute(*reversed(range(tensor.ndim))),
    "flatten": lambda tensor, _: tensor.flatten(),
    "shorten": lambda tensor, _: tensor[:-1],
    "lengthen": lambda tensor, _: torch.cat([tensor, tensor[:1]]),
    "deepen": lambda tensor, _: tensor[None],
    "void": lambda tensor, _: tensor[:0],
    **{str(one)[6:]: to(one) for one in (torch.float64, torch.float32, torch.bfloat16, torch.float16)},
    **{str(one)[6:]: to(one) for one in (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)},
    "float8": to(torch.float8_e4m3fn),
}


def mutate_tensors(path: Path, random: Random) -> Change:
    """Drop, add, rename, swap or change one tensor of a safetensors file, or its metadata."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = random.choice(sorted(tensors))
    what = random.choice(("drop", "stranger", "misspell", "swap", "metadata", *TENSORS))
    if what == "drop":
        del tensors[name]
    elif what == "stranger":  # a bias, or one more block, that nobody asked for
        name = random.choice((name.replace("weight", "bias"), name.replace("layers.1.", "layers.2.")))
        name = name if name not in tensors else f"{name}_scale"
        tensors[name] = torch.ones(64)
    elif what == "misspell":
        tensors[misspelt(name)] = tensors.pop(name)
    elif what == "swap":
        other = random.choice([one for one in sorted(tensors) if tensors[one].shape == tensors[name].shape])
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif what == "metadata":
        metadata = random.choice((None, {}, dict.fromkeys(metadata or {"format": ""}, "fox")))
    else:
        scalar = tensors[name].ndim == 0
        made = TENSORS[what](tensors[name][None] if scalar else tensors[name], random)
        tensors[name] = made[0] if scalar and made.shape == (1,) else made
    path.unlink()
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return Change(what, path.name, "" if what == "metadata" else name)


# --- tables of texts, with columns id and text: what was done to which place ---------------------------------------


def mutate_lines(path: Path, random: Random) -> str:
    """One row of JSON Lines."""
    lines = path.read_text().splitlines()
    n = random.randrange(len(lines))
    row, done = mutate_json_text(lines[n], random)
    path.write_text("\n".join([*lines[:n], row.replace("\n", " "), *lines[n + 1 :]]))
    return done


def mutate_rows(path: Path, random: Random) -> str:
    """A list of rows in one JSON."""
    text, done = mutate_json_text(path.read_text(), random)
    path.write_text(text)
    return done


def mutate_csv(path: Path, random: Random) -> str:
    """Its header, separator or quotes."""
    ways = {"misspell text": ("id,text", "id,txet"), "separator": (",", ";"), "unquoted": ('"', ""), "tab": (",", "\t")}
    done = random.choice(tuple(ways))
    path.write_text(path.read_text().replace(*ways[done]))
    return done


def mutate_parquet(path: Path, random: Random) -> str:
    """The column with the texts."""
    frame = pandas.read_parquet(path)
    ways = {
        "misspell": frame.rename(columns={"text": "txet"}),
        "null": frame.assign(text=frame["text"].where(frame["id"] != 3)),
        "zero": frame.assign(text=0),
        "list": frame.assign(text=[[text] for text in frame["text"]]),
        "remove": frame.drop(columns="text"),
    }
    done = random.choice(tuple(ways))
    ways[done].to_parquet(path)
    return f"{done} text"


TABLES = {".jsonl": mutate_lines, ".json": mutate_rows, ".csv": mutate_csv, ".parquet": mutate_parquet}

# --- any file ------------------------------------------------------------------------------------------------------


def as_folder(path: Path, _: Random) -> None:
    path.unlink()
    path.mkdir()


def as_link(path: Path, random: Random) -> None:
    target = random.choice((path.name, "nowhere", "/", "/dev/null"))
    path.unlink()
    path.symlink_to(target)


def moved(path: Path, _: Random) -> None:
    shutil.move(path, path.with_name(f"old-{path.name}"))


def recoded(encoding: str) -> Callable:
    def recode(path: Path, _: Random) -> None:
        path.write_bytes(path.read_bytes().decode("utf-8", "replace").encode(encoding, "replace"))

    return recode


BYTES: dict[str, Callable[[Path, Random], object]] = {
    "missing": lambda path, _: path.unlink(),
    "moved": moved,
    "empty": lambda path, _: path.write_bytes(b""),
    "cut": lambda path, random: path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)]),
    "cut-end": lambda path, random: path.write_bytes(path.read_bytes()[: -random.randint(1, 40)]),
    "longer": lambda path, random: path.write_bytes(path.read_bytes() + random.randbytes(20)),
    "noise": lambda path, random: path.write_bytes(random.randbytes(500)),
    "words": lambda path, _: path.write_text("the fox\njumps\n" * 40),
    "utf-16": recoded("utf-16"),
    "bom": recoded("utf-8-sig"),
    "crlf": lambda path, _: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    "folder": as_folder,
    "link": as_link,
}


def mutate_bytes(path: Path, random: Random) -> Change:
    """Cut, empty, recode, replace or remove a file."""
    what = random.choice(tuple(BYTES))
    BYTES[what](path, random)
    return Change(what, path.name)
