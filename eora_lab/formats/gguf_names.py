"""What llama.cpp's conversion makes of a model: names of its architecture and its tensors, and the order of rows."""

import re
from dataclasses import dataclass
from typing import Any

from jaxtyping import Shaped
from torch import Tensor, nn

from eora_lab.errors import EoraLabError


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's conversion treats a model type.

    name:     `general.architecture` of the file, without which an adapter is refused.
    permuted: q and k have their rows in the order that its rotary embedding wants.
    """

    name: str
    permuted: bool = False


LLAMA = Architecture("llama", permuted=True)
ARCHITECTURES = {  # model_type -> those whose conversion keeps all other linears as they are
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "gpt_oss": Architecture("gpt-oss"),
    "olmoe": Architecture("olmoe"),
}


class GgufNames:
    """Names of a model's tensors in a GGUF file. Raises EoraLabError for a model type whose conversion is not known.

    architecture: `general.architecture`.
    """

    def __init__(self, model: nn.Module):
        import gguf

        config: Any = getattr(model, "config", None)
        kind = getattr(config, "model_type", None)
        if kind not in ARCHITECTURES:
            raise EoraLabError(
                f"what a GGUF file of a {kind} model holds is not known here: known are {', '.join(ARCHITECTURES)}; "
                "an adapter can be written for peft, and converted by llama.cpp's convert_lora_to_gguf.py"
            )
        self.architecture, self._permuted = ARCHITECTURES[kind].name, ARCHITECTURES[kind].permuted
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self._heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def find(self, module: str) -> str | None:
        """The name, without `.weight`, of a module, or of a linear of all experts (`...experts.gate_proj`)."""
        return self._known.get_name(module)

    def of(self, module: str) -> str:
        """The same. Raises EoraLabError where it has none."""
        if (name := self.find(module)) is None:
            raise EoraLabError(f"{module} has no place in a GGUF file of {self.architecture}")
        return name

    def permuted(self, name: str, rows: Shaped[Tensor, "out ..."]) -> Shaped[Tensor, "out ..."]:
        """Rows of that tensor as the file has them: pairs in each head, the first half's beside the second half's."""
        heads = self._moved(name)
        return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def restored(self, name: str, rows: Shaped[Tensor, "out ..."]) -> Shaped[Tensor, "out ..."]:
        """The inverse. Blocks of quantised weights lie within rows, so that it moves their bytes."""
        heads = self._moved(name)
        return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def _moved(self, name: str) -> int | None:
        """Heads of a tensor whose rows are moved."""
        return self._heads.get(name.rpartition(".")[2]) if self._permuted else None


def of_all_experts(module: str) -> str:
    """The name of a linear of one expert without the number of the expert."""
    return re.sub(r"\.\d+\.([^.]+)$", r".\1", module)
