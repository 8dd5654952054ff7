"""What the fuzzer damages: a kind of input a class, how it is used, and what each change may lead to."""

import gzip
import json
import re
from pathlib import Path
from random import Random
from typing import ClassVar

import pandas

from eora_lab.cli import main
from tests.mutations import BYTES, TABLES, Change, misspelt, mutate_bytes, mutate_file
from tests.tiny import save_tiny

# What may come of a change, beside a refusal, which always may: the same numbers, other ones, or neither
SAME, OTHER, REFUSED = "same", "other", "refused"

LINES = [f"The quick brown fox {n} jumps over the lazy dog, and {n * n} more." for n in range(12)]
CALIBRATION = "--calibration.source words.txt --calibration.nsamples 4 --calibration.seqlen 32"
WINDOWS = "--windows 2 --window-length 32"
EVALUATE = f"--perplexity words.txt {WINDOWS}"
SMALL = f"--model a_model --group-size 32 --rank 8 --no-evaluate {CALIBRATION}"
GRID = """model: a_model
compressor: rtn
group_size: 32
bits: 3
rank: [4, 8]
inputs: original
source: words.txt
nsamples: 4
seqlen: 32
perplexity: [words.txt]
windows: 2
window_length: 32
"""


def eora_lab(line: str) -> None:
    """Run a command that must succeed."""
    assert main(line.split()) == 0, line


class Kind:
    """A kind of input. `prepare` makes it in the current folder, whose name for it starts with "a_"."""

    files: ClassVar[tuple[str, ...]] = ()  # patterns of what is damaged
    uses: ClassVar[tuple[str, ...]] = ()  # command lines, of which the last one prints the numbers; "&&" between

    def prepare(self) -> None:
        Path("words.txt").write_text("\n".join(LINES * 3))
        save_tiny("a_model")

    def mutate(self, use: list[list[str]], random: Random) -> Change:
        """Damage what lies in the current folder, or the command lines themselves."""
        groups = [
            sorted(path for path in Path().glob(pattern) if path.is_file() and path.stat().st_size)
            for pattern in self.files
        ]
        path = random.choice(random.choice([group for group in groups if group]))
        return mutate_file(path, random)

    def control(self, use: list[list[str]]) -> list[list[str]]:
        """Command lines that give the right numbers of the sound input."""
        return use

    def expects(self, change: Change) -> str:
        """`SAME`, `OTHER` or `REFUSED`."""
        raise NotImplementedError

    def use(self, random: Random) -> list[list[str]]:
        """Command lines to run, one after another."""
        return [part.split() for part in random.choice(self.uses).split("&&")]


VALUES = ("swap", "zero", "flip", "permute", "bfloat16", "float16")  # of tensors: other numbers, same form


class Models(Kind):
    """Model folders: transformers says what a key of config.json or of a tokenizer means, and what if it is missing."""

    files = ("a_model/*.safetensors", "a_model/config.json", "a_model/tokenizer*.json", "a_model/generation*.json")
    uses = (f"evaluate a_model {EVALUATE}",) * 3 + ("generate a_model fox --tokens 6",)

    def expects(self, change: Change) -> str:
        if change.file == "model.safetensors":
            if change.what in ("stranger", "drop", "misspell"):
                return REFUSED
            square = re.search("[qo]_proj", change.place) and change.what == "transpose"
            return OTHER if change.what in VALUES or square else SAME
        if change.file == "config.json":
            return OTHER if change.what in ("remove", "misspell", "null", "twice", "negation", "fraction") else SAME
        return SAME if change.what in BYTES else OTHER


class Checkpoints(Kind):
    """GPTQ checkpoints: only codes and scales may differ, for W^ is what it is."""

    files = ("a_checkpoint/*.safetensors", "a_checkpoint/*config.json")
    uses = (f"mend a_checkpoint out --model a_model --rank 8 --no-evaluate {CALIBRATION} && evaluate out {EVALUATE}",)

    def prepare(self) -> None:
        super().prepare()
        eora_lab(f"compress a_run {SMALL} --bits 4 --sym --zero-point integer --scale-dtype float16")
        eora_lab("export a_run a_checkpoint --format gptq --dtype float32")

    def expects(self, change: Change) -> str:
        if change.file == "model.safetensors":
            part = change.place.rpartition(".")[2]
            if change.what in ("drop", "misspell") and part != "g_idx":  # which says nothing without act-order
                return REFUSED
            values = change.what in VALUES and (part in ("qweight", "scales") or change.what in ("permute", "swap"))
            return OTHER if values else SAME
        return SAME


MEANINGS = {  # keys of an adapter_config.json with values by which peft makes something else of the same factors
    "init_lora_weights": ("pissa", "pissa_niter_16", "olora", "corda", "loftq"),
    "use_dora": (True,),
    "use_qalora": (True,),
    "layers_to_transform": ([0],),
    "target_modules": (["q_proj"], ".*mlp.*", []),
    "exclude_modules": (["q_proj"], ".*mlp.*"),
    "layer_replication": ([[0, 2], [1, 2]],),
    "alora_invocation_tokens": ([3, 4],),
    "modules_to_save": (["lm_head"],),
}


class Adapters(Kind):
    """PEFT adapters on the run that they were made for: factors and scalings are content, all else says what it is."""

    files = ("an_adapter/*.safetensors", "an_adapter/*.json")
    uses = (
        f"evaluate a_run --adapter an_adapter {EVALUATE}",
        f"adapter check an_adapter --model a_model --fix out && evaluate a_run --adapter out {EVALUATE}",
    )

    def prepare(self) -> None:
        super().prepare()
        eora_lab(f"compress a_run {SMALL}")
        eora_lab(f"adapter solve a_run an_adapter --rank 4 {CALIBRATION}")

    def mutate(self, use: list[list[str]], random: Random) -> Change:
        if random.random() < 0.8:
            return super().mutate(use, random)
        path, key = Path("an_adapter/adapter_config.json"), random.choice(tuple(MEANINGS))
        value = random.choice(MEANINGS[key])
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        return Change("meaning", path.name, f"{key} {json.dumps(value)}")

    def expects(self, change: Change) -> str:
        if change.file == "adapter_model.safetensors":
            return OTHER if change.what in VALUES else REFUSED if change.what in ("misspell", "stranger") else SAME
        scaled = change.place in ("lora_alpha", "use_rslora") or "_pattern" in change.place
        return REFUSED if change.what == "meaning" else OTHER if scaled and change.what != "misspell" else SAME


class Runs(Kind):
    """Run folders, and the base model beside: what a pass wrote is used as it was written, or not at all."""

    files = ("a_run/*.json", "a_run/blocks/*", "a_run/adapter/*", "a_model/*")
    uses = (
        f"evaluate a_run {EVALUATE}",
        f"evaluate a_run {EVALUATE}",
        f"adapter export a_run an_adapter && evaluate a_run --adapter an_adapter {EVALUATE}",
        f"export a_run a_copy --format merged --dtype float32 && evaluate a_copy {EVALUATE}",
        f"compress a_run {SMALL} && evaluate a_run {EVALUATE}",
    )

    def prepare(self) -> None:
        super().prepare()
        eora_lab(f"compress a_run {SMALL}")

    def expects(self, change: Change) -> str:
        return SAME


class Stores(Kind):
    """Result stores: what cannot be trusted is measured again; a grid is content."""

    files = ("a_store/*.json", "a_store/*.json", "a_store/cache/**/*")
    uses = ("sweep a_grid.yaml --store a_store",)
    wrong: ClassVar[dict[str, str]] = {
        "mapping": "KEY: {value: VALUE}",
        "word": "KEY: fox",
        "negative": "KEY: -1",
        "nan": "KEY: .nan",
        "text": "KEY: 'VALUE'",
        "flag": "KEY: true",
        "bracket": "KEY: [VALUE",
    }

    def prepare(self) -> None:
        super().prepare()
        Path("a_grid.yaml").write_text(GRID)
        eora_lab("sweep a_grid.yaml --store a_store")

    def mutate(self, use: list[list[str]], random: Random) -> Change:
        if random.random() < 0.7:
            return super().mutate(use, random)
        path, lines = Path("a_grid.yaml"), GRID.splitlines()
        n = random.randrange(len(lines))
        key, _, value = lines[n].partition(": ")
        what = random.choice((*self.wrong, "misspell"))
        made = {"misspell": f"{misspelt(key)}: VALUE"} | self.wrong
        lines[n] = made[what].replace("KEY", key).replace("VALUE", value)
        path.write_text("\n".join(lines))
        return Change(what, path.name, key)

    def expects(self, change: Change) -> str:
        return SAME


class Texts(Kind):
    """Texts in all forms that people keep them in: the texts in a file count, not the file."""

    forms: ClassVar[tuple[str, ...]] = (
        *("txt", "txt.gz", "jsonl", "csv"),
        *("jsonl:text", "json:text", "csv:text", "parquet:text", "jsonl.gz:text"),
    )
    uses = (f"evaluate a_model --perplexity a_text.FORM {WINDOWS}",)

    def prepare(self) -> None:
        super().prepare()
        rows = [{"id": n, "text": line} for n, line in enumerate(LINES)]
        text, jsonl, frame = "\n\n".join(LINES), "\n".join(map(json.dumps, rows)), pandas.DataFrame(rows)
        for form, content in {"txt": text, "jsonl": jsonl, "json": json.dumps(rows)}.items():
            Path(f"a_text.{form}").write_text(content)
        Path("a_text.txt.gz").write_bytes(gzip.compress(text.encode()))
        Path("a_text.jsonl.gz").write_bytes(gzip.compress(jsonl.encode()))
        frame.to_csv("a_text.csv", index=False)
        frame.to_parquet("a_text.parquet")

    def use(self, random: Random) -> list[list[str]]:
        form = random.choice(self.forms)
        return [[word.replace("FORM", form) for word in line] for line in super().use(random)]

    def control(self, use: list[list[str]]) -> list[list[str]]:
        return [[re.sub(r"a_text\..*", "a_text.txt", word) for word in line] for line in use]

    def mutate(self, use: list[list[str]], random: Random) -> Change:
        name, _, column = use[0][3].partition(":")
        path, roll = Path(name), random.random()
        change = TABLES.get(path.suffix)
        if roll < 0.1 or (change and not column):
            return Change("as it is" if column or not change else "without a column", name)
        if roll < 0.3 or not change:
            done = mutate_bytes(path, random)
            whole = done.what.startswith("cut") and path.suffix == ".jsonl" and path.read_text()[-1:] == "}"
            return Change("fewer rows", name) if whole else done
        what, _, place = change(path, random).partition(" ")
        return Change(what, name, place)

    def expects(self, change: Change) -> str:
        form = change.file.partition(".")[2]
        if change.what == "without":
            return REFUSED
        if change.what in ("cut", "cut-end", "longer", "words"):
            return OTHER if form in ("txt", "csv") or (change.what, form) == ("words", "txt.gz") else SAME
        row = change.what == "remove" and "." not in change.place and form == "json"
        content = change.what in ("word", "nothing", "text", "fewer rows") and change.place.endswith("text")
        return OTHER if row or content or change.what == "fewer" else SAME
