"""Adapters of mixtures: the forms that experts are written in, in the real peft, and read back."""

import copy

import peft
import pytest
import torch
import transformers

from eora_lab.formats.fused import fused_linears, one_by_one, whole
from eora_lab.formats.names import Factors
from eora_lab.formats.peft import read_adapter, write_adapter
from eora_lab.model.experts import unfold_experts
from eora_lab.model.structure import block_linears, linear_at
from tests.test_experts import MIXTURES, MOE, SIZES, mixture
from tests.tiny import logits, tiny_tokens

MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MORE = {
    "qwen3_moe": (transformers.Qwen3MoeConfig, MOE | {"num_experts": 4, "head_dim": 16}),
    "qwen2_moe": (  # a shared expert beside, whose projections have the names of the experts'
        transformers.Qwen2MoeConfig,
        MOE | {"num_experts": 4, "shared_expert_intermediate_size": 96},
    ),
    "olmoe": (transformers.OlmoeConfig, SIZES | {"intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (  # its first layer is dense
        transformers.DeepseekV3Config,
        MOE | MLA | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"num_key_value_heads": 4},
    ),
    "nemotron_h": (  # no gate
        transformers.NemotronHConfig,
        SIZES | {"layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "moe_intermediate_size": 96}
        | {"moe_shared_expert_intermediate_size": 96, "head_dim": 16, "intermediate_size": 128}
        | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    ),
}  # fmt: skip
MIXTURES |= MORE
KINDS = ["mixtral", *MORE, "gpt_oss", "llama4", "jetmoe"]
TOKENS = tiny_tokens(3)


def ragged(model, seed: int = 0) -> Factors:
    """Random pairs that float16 holds, of ranks 0 to 6, for every linear in the blocks of an unfolded model."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for place, (name, linear) in enumerate(block_linears(model).items()):
        rank = place * 5 % 7
        A = torch.randn(rank, linear.in_features, generator=random) / linear.in_features**0.5
        B = torch.randn(linear.out_features, rank, generator=random) / 8
        found[name] = A.half().float(), B.half().float()
    return found


@torch.no_grad()
def merged(model, factors: Factors):
    """The unfolded model with B A added to its weights."""
    model = copy.deepcopy(model)
    for name, (A, B) in factors.items():
        linear_at(model, name).weight += (B @ A).to(linear_at(model, name).weight.dtype)
    return model


def products(factors: Factors) -> dict[str, torch.Tensor]:
    return {name: B.double() @ A.double() for name, (A, B) in factors.items() if len(A)}


def assert_same(found: Factors, wanted: Factors) -> None:
    """The same products under the same names."""
    found, wanted = products(found), products(wanted)
    assert found.keys() == {name for name, product in wanted.items() if product.any()} | found.keys()
    for name, product in found.items():
        torch.testing.assert_close(product, wanted.get(name, torch.zeros_like(product)), rtol=1e-12, atol=0)


@pytest.fixture(params=KINDS)
def case(request):
    """(kind, plain model, unfolded model, factors)"""
    plain = mixture(request.param)
    unfolded = copy.deepcopy(plain)
    unfold_experts(unfolded)
    return request.param, plain, unfolded, ragged(unfolded)


def test_peft_computes_with_fused_experts_as_meant(case, tmp_path, recwarn):
    _, plain, unfolded, factors = case
    write_adapter(tmp_path, factors, "model", fused=fused_linears(unfolded))
    assert_same(read_adapter(tmp_path)[0], factors)
    wanted, before = logits(merged(unfolded, factors), TOKENS), logits(plain, TOKENS)
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert not [str(warning.message) for warning in recwarn if "adapter" in str(warning.message)]
    found = logits(wrapped, TOKENS)
    scale = (wanted - before).norm()
    assert scale > 0.1 * before.norm()
    assert (found - wanted).norm() <= 1e-5 * scale


def test_experts_one_by_one_are_read_back(case, tmp_path):
    kind, _, unfolded, factors = case
    fused = fused_linears(unfolded)
    write_adapter(tmp_path, factors, "model", universal=True, fused=fused)
    read, config = read_adapter(tmp_path)
    assert not any("gate_up_proj" in name for name in read)
    assert {len(A) for A, _ in read.values()} == {config["r"]} and not config["rank_pattern"]
    names = {
        "mixtral": "model.layers.1.block_sparse_moe.experts.3.w3",
        "gpt_oss": "model.layers.1.mlp.experts.3.up_proj",
    }
    assert names.get(kind, next(iter(read))) in read
    assert_same(whole(read, fused), factors)
    assert {len(A) for A, _ in whole(read, fused).values()} == {config["r"]}
    assert whole(one_by_one(factors, fused), fused).keys() == factors.keys()
