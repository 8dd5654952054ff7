"""PEFT LoRA adapters, in the form that most tools read alike."""

from pathlib import Path

from torch import Tensor

from eora_lab.files import write_json, write_safetensors


def write_adapter(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], base_model: str) -> None:
    """Write an adapter folder from module name -> (A, B), in float16.

    r = lora_alpha, so every loader's scaling is 1. Where all layers have one rank, both patterns stay empty, as some
    loaders ignore them. Where ranks differ, r is the highest and both patterns name the others; layers of rank 0 are
    left out.
    """
    factors = {module: pair for module, pair in factors.items() if len(pair[0])}
    ranks = {module: len(A) for module, (A, _) in factors.items()}
    highest = max(ranks.values(), default=0)
    pattern = {module: rank for module, rank in ranks.items() if rank != highest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": highest,
        "lora_alpha": highest,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks if pattern else {module.rsplit(".", 1)[-1] for module in ranks}),
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    tensors = {}
    for module, (A, B) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.half()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.half()
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config)
