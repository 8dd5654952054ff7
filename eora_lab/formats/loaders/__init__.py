"""What other tools make of a PEFT adapter: one loader a file, one line in `LOADERS`.

The rules were read in the sources of the loaders, whose versions stand in each file; nothing is run.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from eora_lab.formats.loaders import gptqmodel, llamacpp, peft, sglang, vllm
from eora_lab.formats.loaders.given import Given
from eora_lab.formats.peft import peft_scaling


@dataclass(frozen=True)
class Loader:
    """One tool that loads PEFT adapters.

    title:    its name in texts.
    problems: what it refuses, ignores or computes otherwise than meant.
    scaling:  (config, module) -> what it multiplies B A of a layer by.
    serve:    how to run it, where ADAPTER is the folder, RANK its rank, SERVED the next that vLLM serves, BASE the
              compressed model that it belongs to and ORIGINAL the model that this was made from.
    """

    title: str
    problems: Callable[[Given], Iterable[str]]
    scaling: Callable[[dict, str], float]
    serve: str


LOADERS = {
    "peft": Loader("peft", peft.problems, peft_scaling, peft.SERVE),
    "vllm": Loader("vLLM", vllm.problems, peft_scaling, vllm.SERVE),
    "sglang": Loader("SGLang", sglang.problems, sglang.scaling, sglang.SERVE),
    "gptqmodel": Loader("GPTQModel", gptqmodel.problems, gptqmodel.scaling, gptqmodel.SERVE),
    "llama.cpp": Loader("llama.cpp", llamacpp.problems, llamacpp.scaling, llamacpp.SERVE),
}
