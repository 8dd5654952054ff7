"""Peak memory and time of a pass against the sizes of a model: `python -m docs.scale FOLDER`, models made on the spot.

Every line is one command, `eora-lab mend` of a Q4_0 file or `eora-lab compress`, in a process of its own, on random
weights of the sizes asked for. Output channels differ in scale, as those of trained models do: with channels all alike
no direction of an error would stand out, and every solve would take its slowest road. All blocks of a model are alike,
so that it is soon made; its shards are the weights of the file with noise as large as their rounding. It is kept in the
folder for the next time.

`anonymous` is the memory of that process that the system cannot take back, looked at every 20 ms. The rest of `peak` is
pages of files, of which it keeps as many as there is room for. `reported` and `predicted` are what the run's own report
says of `anonymous`: of the pass and of judging, without loading. A hard limit shows that they are not needed. As root,
with cgroups of version 1, where the files must not lie in memory that others account for:

    mkdir /sys/fs/cgroup/memory/eora; echo 6G > /sys/fs/cgroup/memory/eora/memory.limit_in_bytes
    python -m docs.scale /tmp/scale --hidden 4096 --ffn 11008 --blocks 32 --cgroup /sys/fs/cgroup/memory/eora
"""

import argparse
import itertools
import json
import os
import shutil
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from eora_lab.files import write_json

VOCABULARY, HEAD = 32000, 128
EMBEDDING, HEADS = "model.embed_tokens.weight", "lm_head.weight"
LINEARS = {  # name in the model -> in the file
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
Q4_0 = gguf.GGMLQuantizationType.Q4_0


def make(folder: Path, hidden: int, ffn: int, blocks: int) -> None:
    """Write an original model in bfloat16, a shard a block, and its Q4_0 file `model.gguf`."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // HEAD,
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(["?", *string.printable.replace("?", "")])}
    by_letter = tokenizers.Tokenizer(tokenizers.models.BPE(letters, merges=[], unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=by_letter, unk_token="?").save_pretrained(folder)
    random, shards = np.random.default_rng(0), dict[str, str]()
    sizes = {name: _size(name, hidden, ffn) for name in LINEARS}
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_embedding_length(hidden)
    writer.add_block_count(blocks)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)

    def keep(shard: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / shard, {"format": "pt"})
        shards.update(dict.fromkeys(tensors, shard))

    outer = {name: torch.from_numpy(random.standard_normal((VOCABULARY, hidden), np.float32)).bfloat16()
             for name in (EMBEDDING, HEADS)}  # fmt: skip
    outer[HEADS] *= hidden**-0.5
    keep("outer.safetensors", outer | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    plain = {"token_embd": outer[EMBEDDING].half().numpy(), "output": outer[HEADS].half().numpy()}
    plain |= {"output_norm": np.ones(hidden, np.float32)}
    for name, values in plain.items():
        writer.add_tensor_info(f"{name}.weight", values.shape, values.dtype, values.nbytes)
    for block, (name, (rows, columns)) in itertools.product(range(blocks), sizes.items()):
        nbytes = rows * columns // 32 * 18
        shape = (rows, columns // 32 * 18)
        writer.add_tensor_info(f"blk.{block}.{LINEARS[name]}.weight", shape, np.dtype(np.uint8), nbytes, Q4_0)
    for block, name in itertools.product(range(blocks), NORMS.values()):
        writer.add_tensor_info(f"blk.{block}.{name}.weight", (hidden,), np.dtype(np.float32), 4 * hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in plain.values():
        writer.write_tensor_data(values)
    codes, tensors = {}, {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in NORMS}
    for name, (rows, columns) in sizes.items():
        codes[name], weight = _linear(random, rows, columns)
        if name.endswith(("q_proj", "k_proj")):  # the file has the rows of a head in pairs
            weight = weight.unflatten(0, (hidden // HEAD, -1, 2)).transpose(1, 2).flatten(0, 2)
        tensors[f"{name}.weight"] = weight.contiguous()
    for block in range(blocks):
        for name in sizes:
            writer.write_tensor_data(codes[name])
        keep(f"block-{block}.safetensors", {f"model.layers.{block}.{key}": one for key, one in tensors.items()})
    for _ in range(blocks * len(NORMS)):
        writer.write_tensor_data(np.ones(hidden, np.float32))
    writer.close()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": shards})


def _size(name: str, hidden: int, ffn: int) -> tuple[int, int]:
    """(out, in) of a linear."""
    return (hidden, ffn) if "down" in name else (ffn, hidden) if "mlp" in name else (hidden, hidden)


def _linear(random: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, Tensor]:
    """Blocks of a Q4_0 weight, and the weight that they could be a rounding of, in bfloat16."""
    codes = random.integers(0, 256, (rows, columns // 32, 18), np.uint8)
    spread = np.exp(random.standard_normal((rows, 1, 1), np.float32) - 1)  # mean square 1
    scale = np.repeat((0.2 * columns**-0.5 * spread).astype(np.float16), columns // 32, axis=1)
    codes[..., :2] = scale.view(np.uint8)
    codes = codes.reshape(rows, -1)
    weight = gguf.quants.dequantize(codes, Q4_0)
    weight += scale[:, 0] * (random.random((rows, columns), np.float32) - 0.5)
    return codes, torch.from_numpy(weight).bfloat16()


def measure(command: list[str], cgroup: Path | None) -> dict[str, int]:
    """Run a command in a process of its own, in a memory cgroup if one is named: seconds, and bytes at the highest.

    Raises CalledProcessError when it fails.
    """

    def enter() -> None:
        if cgroup:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    started, most = time.perf_counter(), {"VmRSS": 0, "RssAnon": 0}
    child = subprocess.Popen(command, preexec_fn=enter, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        said = dict(line.split(":", 1) for line in lines)
        most = {name: max(value, 1024 * int(said.get(name, "0").split()[0])) for name, value in most.items()}
        time.sleep(0.02)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return {"seconds": round(time.perf_counter() - started), "peak": most["VmRSS"], "anonymous": most["RssAnon"]}


def forget(folder: Path) -> None:
    """Take the files of a model out of the system's memory, so that who reads them next has to account for them."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where models are made and kept")
    parser.add_argument("--task", default="mend", choices=("mend", "compress"), help="a Q4_0 file, or in RTN 3-bit")
    for name, default in (("hidden", 2048), ("blocks", 8), ("tokens", 1024), ("rank", 64)):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=[default])
    parser.add_argument("--ffn", type=int, help="width of the feed-forward layers; by default 11/4 of hidden")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--cgroup", type=Path, help="memory cgroup to run in")
    asked = parser.parse_args()
    names = ("task", "hidden", "ffn", "blocks", "tokens", "rank", "seconds", "peak", "anonymous")
    names += ("reported", "predicted")
    print(",".join(names), flush=True)
    for hidden, blocks, tokens, rank in itertools.product(asked.hidden, asked.blocks, asked.tokens, asked.rank):
        ffn = asked.ffn or hidden * 11 // 4
        model = asked.folder / f"{hidden}-{ffn}-{blocks}"
        if not (model / "model.safetensors.index.json").exists():
            shutil.rmtree(model, ignore_errors=True)
            make(model, hidden, ffn, blocks)
        with tempfile.TemporaryDirectory(dir=asked.folder) as place:
            run = f"{place}/run"
            start = [sys.executable, "-m", "eora_lab.cli", asked.task]
            start += [str(model / "model.gguf"), run] if asked.task == "mend" else [run, "--compressor", "rtn"]
            start += ["--bits", "3"] if asked.task == "compress" else []
            length = ["--calibration.seqlen", str(asked.seqlen), "--evaluation.window-length", str(asked.seqlen)]
            samples = ["--calibration.nsamples", str(tokens // asked.seqlen), "--evaluation.windows", "4"]
            about = ["--model", str(model), "--dtype", "bfloat16", "--rank", str(rank)]
            forget(model)
            found = measure(start + about + samples + length, asked.cgroup)
            report = json.loads(Path(run, "report.json").read_text())
        found |= {"reported": report["own_memory"], "predicted": report["needed_memory"]}
        settings = {"task": asked.task, "hidden": hidden, "ffn": ffn, "blocks": blocks, "tokens": tokens, "rank": rank}
        print(",".join(str(value) for value in (settings | found).values()), flush=True)


if __name__ == "__main__":
    main()
