"""Command lines as the fuzzer changes them: options with values that they take, and with values that they refuse."""

from random import Random
from typing import ClassVar

from tests.fuzz_kinds import CALIBRATION, EVALUATE, OTHER, REFUSED, SMALL, Kind, eora_lab
from tests.mutations import Change, misspelt

# option -> values that it takes, and values that it must refuse
TEXT_OPTIONS = {
    "--windows": ("1 3", "0 -1 1000000 1.5 nan many"),
    "--window-length": ("16 64", "1 0 -5 1000000000 2.5 nan"),
    "--perplexity": ("words.txt", "nowhere.txt a_model self pydoc:nowhere words.txt+words.txt :"),
}
LOAD_OPTIONS = {
    "--dtype": ("bfloat16 float64", "float99 int8 4"),
    "--backend": ("auto tiles", "fastest 3"),
    "--device": ("cpu", "gpu9 cuda:99 tpu"),
}
PATH_OPTIONS = {
    "--method": ("svd act_s none", "eroa 3"),
    "--rank": ("4 16 0", "-1 1000000 1.5 nan many"),
    "--factor-bits": ("4 8", "0 1 9 17 -4 2.5"),
    "--held-out": ("0.25 0.5", "-0.1 1 1.5 nan inf"),
    "--inputs": ("original", "orignal 1"),
    "--calibration.nsamples": ("2 5", "0 -1 1000000000 1.5 nan"),
    "--calibration.seqlen": ("16 40", "0 -8 1000000000 1.5"),
    "--calibration.share": ("0.25", "0 1 -1 nan 7"),
    "--calibration.source": ("words.txt self", "nowhere.txt a_model words.txt+ pydoc:nowhere"),
    "--calibration.seed": ("1 7", "one 0.5"),
    "--budget.objective": ("relative absolute", "relativ 1"),
    "--budget.only": ("proj", "x{9} ( nothing"),
}
BASE_OPTIONS = {
    "--compressor": ("rtn", "gtpq wanda 4"),
    "--bits": ("2 3 8", "0 1 9 17 -4 nan 3.5"),
    "--group-size": ("16 64 -1", "0 -2 nan 1.5"),
    "--scale-dtype": ("float16", "float8 int8"),
    "--zero-point": ("integer", "intger 8"),
    "--sparsity": ("", "2:4 0.5 nonsense"),
    "--rounds": ("2", "0 -1 1.5"),
    "--skip": ("down_proj", "x{9} ( proj"),
    "--only": ("attn", "x{9} *"),
    "--keep-first": ("1", "-1 2 1000 one"),
}
SAMPLING = {
    "--tokens": ("1 9", "0 -4 1.5 many"),
    "--temperature": ("0.7", "-1 nan inf hot"),
    "--seed": ("3 1180591620717411303424 -1", "one 1.5"),
}
EXPORT = {
    "--format": ("merged", "safetensor gguf 3"),
    "--base": ("a_model", "a_run nowhere words.txt"),
    "--dtype": LOAD_OPTIONS["--dtype"],
}


class Commands(Kind):
    """Command lines: an option's value is content where it can be one."""

    options: ClassVar[dict[str, dict[str, tuple[str, str]]]] = {
        f"evaluate a_run {EVALUATE}": TEXT_OPTIONS | LOAD_OPTIONS,
        "generate a_run fox --tokens 6": SAMPLING | LOAD_OPTIONS,
        f"compress out {SMALL} && evaluate out {EVALUATE}": PATH_OPTIONS | BASE_OPTIONS,
        f"adapter solve a_run out {CALIBRATION} && evaluate a_run --adapter out {EVALUATE}": PATH_OPTIONS,
        f"export a_run out --format dense && evaluate out {EVALUATE}": EXPORT,
    }
    uses = tuple(options)

    def prepare(self) -> None:
        super().prepare()
        eora_lab(f"compress a_run {SMALL}")

    def mutate(self, use: list[list[str]], random: Random) -> Change:
        line = use[0]
        options = next(known for text, known in self.options.items() if text.split()[:2] == line[:2])
        option, what = random.choice(tuple(options)), random.choice(("good", "bad", "bad", "bad", "misspell", "bare"))
        if option in line:
            del line[line.index(option) : line.index(option) + 2]
        if what == "bare":
            line.append(option)
            return Change(what, option)
        good, bad = (values.split() or [""] for values in options[option])
        value = random.choice(bad if what == "bad" else good)
        line += [misspelt(option) if what == "misspell" else option, value]
        return Change(what, option, value)

    def expects(self, change: Change) -> str:
        return OTHER if change.what == "good" else REFUSED
