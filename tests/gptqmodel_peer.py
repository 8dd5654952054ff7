"""What the real GPTQModel makes of a folder: run by `test_gptqmodel.py` under a Python that has it.

read OUTPUT FOLDER...   load checkpoints on the CPU; write their dequantised weights and logits
make MODEL JSON         quantise a model in several ways: JSON is {folder to write: settings}
"""

import json
import os
import sys

# GPTQModel 7.7 does not start with fewer workers, as it does on two cores; compiling (also its packing) takes minutes
os.environ |= {"GPTQMODEL_CPU_WORKERS": "2", "TORCH_COMPILE_DISABLE": "1"}

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file

TOKENS = torch.arange(3, 67).view(2, 32)


def read(output: str, *folders: str) -> None:
    found = {}
    for folder in folders:
        model = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model.eval()
        label = os.path.basename(folder)
        with torch.no_grad():
            found[f"{label}/logits"] = model(TOKENS).logits
            for name, module in model.named_modules():
                if hasattr(module, "qweight"):
                    found[f"{label}/{name}"] = module.dequantize_weight().T.contiguous()
    save_file(found, output)


def make(model: str, several: str) -> None:
    texts = ["".join(map(chr, torch.randint(97, 123, (200,)).tolist())) for _ in range(8)]
    for folder, settings in json.loads(several).items():
        config = QuantizeConfig(**settings, offload_to_disk=False, device="cpu", pack_impl="original")
        quantised = GPTQModel.load(model, config, dtype=torch.float16)
        quantised.quantize(texts, batch_size=1)
        quantised.save(folder)


if __name__ == "__main__":
    {"read": read, "make": make}[sys.argv[1]](*sys.argv[2:])
