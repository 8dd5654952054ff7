"""MLX adapters: their tensors, and the real mlx-lm, which is optional: it needs a Python of its own.

python -m venv mlx && mlx/bin/pip install "mlx[cpu]" mlx-lm
EORA_LAB_MLX=mlx/bin/python pytest tests/test_mlx_adapter.py
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eora_lab import EoraLabError, load_model
from eora_lab.cli import main
from eora_lab.formats.mlx_adapter import write_mlx_adapter
from tests.test_expert_adapters import merged, mixture, ragged
from tests.test_gguf_adapter import PROMPTS, in_transformers, unfolded_of
from tests.tiny import SMALL, compress, save_tiny, tiny_model, tiny_tokens

PYTHON = os.environ.get("EORA_LAB_MLX")
PEER = Path(__file__).with_name("mlx_peer.py")
DENSE = ["llama", "qwen2", "gemma"]
MIXTURES = {"mixtral": {}, "qwen3_moe": {"norm_topk_prob": True}, "qwen2_moe": {}, "olmoe": {}}


def model_of(kind: str):
    return tiny_model(kind) if kind in DENSE else mixture(kind, **MIXTURES[kind])


def in_mlx(model: Path, adapter: Path | None) -> torch.Tensor:
    """(prompts, 97) log-probabilities of the next token."""
    asked = {"model": str(model), "adapter": adapter and str(adapter), "prompts": PROMPTS}
    done = subprocess.run([PYTHON, PEER], input=json.dumps(asked), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return torch.tensor(json.loads(line.removeprefix("RESULT"))).log_softmax(-1)


@pytest.mark.skipif(not PYTHON, reason="EORA_LAB_MLX names no Python that has mlx and mlx-lm")
@pytest.mark.parametrize("kind", [*DENSE, *MIXTURES])
def test_mlx_computes_as_meant(kind, tmp_path):
    plain = model_of(kind)
    unfolded = unfolded_of(plain)
    factors = ragged(unfolded)
    plain.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())  # with names that published ones have
    config = {"num_experts": config.get("num_local_experts")} | config
    config["rope_theta"] = plain.config.rope_parameters["rope_theta"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    write_mlx_adapter(tmp_path / "adapter", factors, "model", unfolded)
    before, after = in_transformers(plain), in_transformers(merged(unfolded, factors))
    base = (in_mlx(tmp_path / "model", None) - before).abs().max()
    found = (in_mlx(tmp_path / "model", tmp_path / "adapter") - after).abs().max()
    assert base < 1e-3 and found < 1e-2
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt_oss"])
def test_products_are_those_of_the_factors(kind, tmp_path):
    """y += scale (x a) b for linears; a and b of an expert as its own lora_A and lora_B."""
    model = tiny_model("llama") if kind == "llama" else unfolded_of(mixture(kind))
    factors = ragged(model)
    write_mlx_adapter(tmp_path / "out", factors, "model", model)
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    rank = max(len(A) for A, _ in factors.values())
    settings = config["lora_parameters"]
    assert (settings["rank"], settings["scale"], config["num_layers"]) == (rank, 1.0, 2)
    seen = set()
    for name, (A, B) in factors.items():
        if ".experts." in name:
            holder, index, leaf = name.rsplit(".", 2)
            block = holder.removesuffix(".mlp.experts")
            place = {"mixtral": f"{block}.block_sparse_moe.switch_mlp", "gpt_oss": f"{block}.mlp.experts"}[kind]
            if leaf == "down_proj":
                leaves = {"down_proj": slice(None)}
            elif kind == "gpt_oss":
                leaves = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
            else:
                leaves = {"gate_proj": slice(len(B) // 2), "up_proj": slice(len(B) // 2, None)}
            for part, rows in leaves.items():
                if f"{place}.{part}.lora_a" in tensors:
                    a, b = (tensors[f"{place}.{part}.lora_{half}"][int(index)].float() for half in "ab")
                    assert a.shape == (rank, A.shape[1]) and b.shape[1] == rank
                    torch.testing.assert_close(b @ a, (B @ A)[rows], rtol=0, atol=5e-3)
                    seen.add(f"{place}.{part}")
                else:
                    assert not (B @ A).any()
            continue
        if f"{name}.lora_a" not in tensors:
            assert not len(A)
            continue
        a, b = (tensors[f"{name}.lora_{half}"].float() for half in "ab")
        assert a.shape == (A.shape[1], rank) and b.shape == (rank, len(B))
        x = np.random.default_rng(0).standard_normal((3, A.shape[1])).astype(np.float32)
        meant = x @ A.numpy().T @ B.numpy().T
        np.testing.assert_allclose(x @ a.numpy() @ b.numpy(), meant, atol=0.02)
        seen.add(name)
    assert {key.rpartition(".")[0] for key in tensors} == seen
    assert {name.split(".", 3)[3] for name in seen} == set(settings["keys"])


def test_what_has_no_mlx_form_is_refused(tmp_path):
    model = unfolded_of(mixture("dbrx"))
    with pytest.raises(EoraLabError, match="names of a dbrx model in mlx-lm are not known here: known are llama, "):
        write_mlx_adapter(tmp_path / "a", ragged(model), "model", model)
    nothing = {"model.layers.0.self_attn.q_proj": (torch.ones(0, 64), torch.ones(64, 0))}
    with pytest.raises(EoraLabError, match="every rank is 0"):
        write_mlx_adapter(tmp_path / "a", nothing, "model", tiny_model("llama"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "note").touch()
    pair = {"model.layers.0.self_attn.q_proj": (torch.ones(1, 64), torch.ones(64, 1))}
    with pytest.raises(EoraLabError, match="not an empty folder"):
        write_mlx_adapter(tmp_path / "a", pair, "model", tiny_model("llama"))


Q = "model.layers.1.self_attn.q_proj"


def retensored(change):
    def harm(folder):
        tensors = load_file(folder / "adapters.safetensors")
        change(tensors)
        save_file({key: one.contiguous() for key, one in tensors.items()}, folder / "adapters.safetensors")

    return harm


def reconfigured(**changes):
    def harm(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_parameters"] |= {key: value for key, value in changes.items() if key in ("rank", "keys")}
        config |= {key: value for key, value in changes.items() if key not in ("rank", "keys")}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return harm


HARMS = {
    "another type": (reconfigured(fine_tune_type="dora"), "is of type dora"),
    "no number of blocks": (reconfigured(num_layers=None), "needs num_layers"),
    "another rank": (reconfigured(rank=4), "refuses model.layers.0.self_attn.q_proj.lora_a: it is (64, 8)"),
    "fewer keys": (reconfigured(keys=["mlp.up_proj"]), "which keys and num_layers leave out"),
    "fewer blocks": (reconfigured(num_layers=1), "refuses model.layers.0.mlp.down_proj (and 6 more), which keys"),
    "a shape": (
        retensored(lambda t: t.update({f"{Q}.lora_b": t[f"{Q}.lora_b"].T})),
        f"refuses {Q}.lora_b: it is (64, 8)",
    ),
    "NaN": (retensored(lambda t: t.update({f"{Q}.lora_b": t[f"{Q}.lora_b"] * torch.nan})), "lora_b has NaN or Inf"),
    "a half": (retensored(lambda t: t.pop(f"{Q}.lora_a")), f"the other half of {Q} by itself"),
    "a name": (retensored(lambda t: t.update(other=torch.ones(1))), "refuses other, which is no lora_a"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("mlx")
    save_tiny(place / "model")
    model, _ = load_model(place / "model")
    compress(model, tiny_tokens(), **SMALL, inputs="original", folder=place / "run")
    return place / "run"


@pytest.mark.parametrize("name", HARMS)
def test_check_names_what_mlx_gets_wrong(name, run, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["adapter", "export", str(run), out, "--format", "mlx"]) == 0
    assert main(["adapter", "check", out]) == 0
    assert "mlx-lm loads it" in capsys.readouterr().out
    harm, words = HARMS[name]
    harm(tmp_path / "out")
    assert main(["adapter", "check", out]) == 1
    printed = capsys.readouterr()
    assert "mlx: " in printed.out and words in printed.out
    assert len(printed.err.strip().splitlines()) == 1


def test_damaged_mlx_adapters_are_one_line(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["adapter", "export", str(run), str(out), "--format", "mlx"]) == 0
    assert main(["adapter", "check", str(out), "--fix", str(tmp_path / "fixed")]) == 1
    assert "is no PEFT adapter" in capsys.readouterr().err
    (out / "adapters.safetensors").write_bytes(b"x" * 99)
    assert main(["adapter", "check", str(out)]) == 1
    assert "copy or download it again" in capsys.readouterr().err
    (out / "adapter_config.json").write_text("{")
    assert main(["adapter", "check", str(out)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "adapter_config.json is damaged" in line
