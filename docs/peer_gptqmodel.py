"""What `docs.peers` has GPTQModel do: run under a Python that has it, `peer_gptqmodel.py STEP JSON`.

STEP: quantise, or eora, which makes an adapter for what was quantised. JSON: the settings, see `docs.peers`. It prints
the seconds that the step took inside, without start and imports.
"""

import json
import os
import sys
import time

# GPTQModel 7.7 does not start with fewer workers, as it does on two cores; compiling (also its packing) takes minutes
os.environ |= {"GPTQMODEL_CPU_WORKERS": "4", "TORCH_COMPILE_DISABLE": "1"}

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import Lora


def quantise(asked: dict, texts: list[dict]) -> None:
    """GPTQ, with what GPTQModel takes by itself where the settings say nothing."""
    config = QuantizeConfig(**asked["grid"], offload_to_disk=False, device="cpu", pack_impl="original")
    model = GPTQModel.load(asked["model"], config, dtype=torch.float16)
    model.quantize(texts, batch_size=1)
    model.save(asked["quantised"])


def eora(asked: dict, texts: list[dict]) -> None:
    """An adapter for what `quantise` wrote."""
    GPTQModel.adapter.generate(
        adapter=Lora(path=asked["adapter"], rank=asked["rank"]),
        model_id_or_path=asked["model"],
        quantized_model_id_or_path=asked["quantised"],
        calibration_dataset=texts,
        batch_size=1,
        dtype=torch.float16,
        device="cpu",
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    torch.set_num_threads(asked["threads"])
    texts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in asked["tokens"]]
    started = time.perf_counter()
    {"quantise": quantise, "eora": eora}[sys.argv[1]](asked, texts)
    print(f"\nINSIDE {time.perf_counter() - started:.3f}")
