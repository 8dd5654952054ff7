"""What the real llama.cpp makes of a GGUF file and an adapter: run by `test_gguf_adapter.py` under another Python.

JSON on stdin: {"model": path, "adapter": path or null, "prompts": [[token, ...], ...]}
JSON on stdout: log-probabilities of the next token of each prompt, by token id
"""

import json
import sys

import xllamacpp


def main(model: str, adapter: str | None, prompts: list[list[int]]) -> list[dict[str, float]]:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 256, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    float32 = type(params.cache_type_k)(0)
    params.cache_type_k = params.cache_type_v = float32  # by default float16, which tells in the third decimal
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server, found = xllamacpp.Server(params), []
    for prompt in prompts:
        answer = server.handle_completions({"prompt": prompt, "max_tokens": 1, "logprobs": 97, "cache_prompt": False})
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        (first,) = answer["choices"][0]["logprobs"]["content"]
        found.append({str(entry["id"]): entry["logprob"] for entry in first["top_logprobs"]})
    return found


if __name__ == "__main__":
    print("RESULT" + json.dumps(main(**json.load(sys.stdin))))
