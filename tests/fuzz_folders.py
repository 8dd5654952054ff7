"""Checkpoint folders of all quantisers as the fuzzer damages them, and originals that are not theirs."""

from pathlib import Path
from random import Random

from tests.folders import FOLDERS, gpt_oss, quantise, save_gpt_oss
from tests.fuzz_kinds import CALIBRATION, EVALUATE, OTHER, REFUSED, SAME, VALUES, Kind
from tests.mutations import Change, mutate_file
from tests.tiny import save_tiny, tiny_tokenizer

# what else stands beside a weight says what it is, and is no content
CONTENT = ("weight", "qweight", "qzeros", "scales", "W_q", "scale", "zero", "absmax", "quant_map", "_blocks", "_scales")
CONTENT += ("weight_packed", "weight_scale", "weight_scale_2", "weight_scale_inv", "_weight_qdata", "_weight_scale")
CONTENT += ("_weight_zero_point",)


class Folders(Kind):
    """Only codes, scales and zero points may differ, for W^ is what it is; all else says what they mean."""

    forms = (*FOLDERS, "mxfp4")
    uses = (
        f"mend a_checkpoint_FORM out --model MODEL --rank 8 --no-evaluate {CALIBRATION} && evaluate out {EVALUATE}",
    )

    def prepare(self) -> None:
        super().prepare()
        save_tiny("a_model_else", seed=1)
        for form, (linear, about) in FOLDERS.items():
            quantise(Path(f"a_checkpoint_{form}"), linear, about)
        gpt_oss().save_pretrained("a_model_mxfp4")
        tiny_tokenizer().save_pretrained("a_model_mxfp4")
        save_gpt_oss(Path("a_checkpoint_mxfp4"))

    def use(self, random: Random) -> list[list[str]]:
        form = random.choice(self.forms)
        model = "a_model_mxfp4" if form == "mxfp4" else "a_model"
        return [[word.replace("FORM", form).replace("MODEL", model) for word in line] for line in super().use(random)]

    def mutate(self, use: list[list[str]], random: Random) -> Change:
        folder = Path(use[0][1])
        if random.random() < 0.05:
            use[0][use[0].index("--model") + 1] = "a_model_else"
            return Change("foreign", "--model", "a_model_else")
        name = random.choice(("model.safetensors", "model.safetensors", "config.json"))
        return mutate_file(folder / name, random)

    def expects(self, change: Change) -> str:
        if change.what == "foreign":
            return REFUSED
        if change.file == "model.safetensors":
            content = change.place.endswith(CONTENT)
            return OTHER if content and change.what in (*VALUES, "transpose") else SAME
        return SAME
