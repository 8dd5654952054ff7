"""What mlx-lm makes of a model and an adapter: run by `test_mlx_adapter.py` under another Python.

JSON on stdin: {"model": folder, "adapter": folder or null, "prompts": [[token, ...], ...]}
JSON on stdout: logits of the next token of each prompt
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def main(model: str, adapter: str | None, prompts: list[list[int]]) -> list[list[float]]:
    mx.set_default_device(mx.cpu)
    loaded = load_model(Path(model))[0]
    if adapter:
        loaded = load_adapters(loaded, adapter)
        loaded.eval()
    return [loaded(mx.array([prompt]))[0, -1].astype(mx.float32).tolist() for prompt in prompts]


if __name__ == "__main__":
    print("RESULT" + json.dumps(main(**json.load(sys.stdin))))
