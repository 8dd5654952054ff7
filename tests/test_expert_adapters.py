"""Adapters of mixtures: the forms that experts are written in, in the real peft, and read back."""

import copy

import peft
import pytest
import torch
import transformers

from eora_lab import EoraLabError, load_model, load_run
from eora_lab.cli import main
from eora_lab.formats.adapter_check import check_adapter, fix_adapter
from eora_lab.formats.fused import fused_linears, one_by_one, whole
from eora_lab.formats.gguf_idle import idle_modules
from eora_lab.formats.names import Factors
from eora_lab.formats.peft import adapter_factors, read_adapter, read_files, write_adapter
from eora_lab.layer.linear import compensated
from eora_lab.model.expert_kinds import unfold_experts
from eora_lab.model.structure import block_linears, linear_at
from eora_lab.run.adapters import Adapters, use_only
from tests.test_experts import MIXTURES, MOE, SIZES, mixture
from tests.tiny import SMALL, compress, logits, tiny_tokenizer, tiny_tokens

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
KINDS = ["mixtral", *MORE, "gpt_oss", "llama4", "jetmoe", "longcat"]
TOKENS = tiny_tokens(3)


def ragged(model, seed: int = 0) -> Factors:
    """Random pairs that float16 holds, of ranks 0 to 6, for every linear in the blocks of an unfolded model."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    linears = {name: m for name, m in block_linears(model).items() if type(m).forward is torch.nn.Linear.forward}
    plain = {name: m for name, m in linears.items() if ".router." not in name}  # some models read its weight themselves
    for place, (name, linear) in enumerate(plain.items()):
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
    write_adapter(tmp_path, factors, "model", model=unfolded)
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
    write_adapter(tmp_path, factors, "model", universal=True, model=unfolded)
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


def findings(folder, model) -> dict[str, list[str]]:
    """Loader -> problems."""
    shapes = {name: (m.out_features, m.in_features) for name, m in block_linears(model).items()}
    found: dict[str, list[str]] = {}
    for finding in check_adapter(*read_files(folder), shapes, model):
        found.setdefault(finding.loader, []).append(finding.problem)
    return found


def everywhere(model, rank: int = 8) -> Factors:
    return {n: (torch.ones(rank, m.in_features), torch.ones(m.out_features, rank) / 8)
            for n, m in block_linears(model).items()}  # fmt: skip


def test_check_says_which_loader_takes_which_form(tmp_path):
    model = mixture()
    unfold_experts(model)
    factors = everywhere(model)
    write_adapter(tmp_path / "together", factors, "model", model=model)
    found = findings(tmp_path / "together", model)
    assert found.keys() == {"vllm", "sglang", "llama.cpp", "gptqmodel"}
    assert any("only where it keeps experts as one tensor" in problem for problem in found["vllm"])
    assert "does not know model.layers.0.mlp.experts" in found["llama.cpp"][0]
    write_adapter(tmp_path / "apart", factors, "model", universal=True, model=model)
    found = findings(tmp_path / "apart", model)
    assert found.keys() == {"peft", "vllm", "sglang"}
    assert "without --universal" in found["peft"][0] and "experts.0.w1" in found["sglang"][0]
    lacking = {name: pair for name, pair in factors.items() if not name.endswith("experts.2.down_proj")}
    write_adapter(tmp_path / "lacking", lacking, "model", universal=True, model=model)
    found = findings(tmp_path / "lacking", model)
    assert "layers.0.block_sparse_moe.experts.2.w2 has no factors" in found["llama.cpp"][0]
    gates = {name: pair for name, pair in factors.items() if not name.endswith("down_proj")}
    write_adapter(tmp_path / "gates", gates, "model", universal=True, model=model)
    problems = findings(tmp_path / "gates", model)["llama.cpp"]
    assert all("needs all linears of all experts of a layer" in one for one in problems) and len(problems) == 2
    assert "layers.0.block_sparse_moe.experts.0.w2 (and 3 more) has no factors" in problems[0]


def test_check_names_what_is_loaded_and_applied_nowhere(tmp_path):
    model = mixture("deepseek_v3")
    unfold_experts(model)
    write_adapter(tmp_path / "all", everywhere(model), "model", universal=True, model=model)
    found = findings(tmp_path / "all", model)
    assert any("(and 7 more) and does not apply it" in problem for problem in found["llama.cpp"])
    absorbed = "loads model.layers.0.self_attn.kv_b_proj (and 1 more) and does not apply it"
    assert any(absorbed in problem for problem in found["vllm"])
    rest = {name: pair for name, pair in everywhere(model).items() if "_a_proj" not in name and "_b_proj" not in name}
    write_adapter(tmp_path / "rest", rest, "model", universal=True, model=model)
    assert not [one for problems in findings(tmp_path / "rest", model).values() for one in problems if "apply" in one]


@pytest.mark.parametrize(
    ("model_type", "module", "idle"),
    [
        ("deepseek_v32", "self_attn.indexer.wq_b", True),
        ("deepseek_v32", "self_attn.o_proj", False),
        ("glm_moe_dsa", "self_attn.kv_a_proj_with_mqa", True),
        ("minicpm3", "self_attn.q_b_proj", True),
        ("kimi_linear", "self_attn.o_proj", True),
        ("kimi_linear", "mlp.down_proj", False),
        ("kimi_k25", "self_attn.kv_b_proj", True),
        ("llama", "self_attn.q_proj", False),
    ],
)
def test_modules_without_adapters_in_llamacpp(model_type, module, idle):
    name = f"model.layers.0.{module}"
    assert idle_modules(model_type, 2, [name]) == ([name] if idle else [])


@pytest.mark.parametrize("universal", [False, True])
def test_a_foreign_adapter_of_experts_is_mended(universal, tmp_path):
    model = mixture()
    unfold_experts(model)
    factors = ragged(model)
    write_adapter(tmp_path, factors, "model", universal=universal, model=model)
    tensors, config = read_files(tmp_path)
    config |= {
        "lora_alpha": 2 * config["lora_alpha"],
        "alpha_pattern": {k: 2 * v for k, v in config["alpha_pattern"].items()},
    }
    shapes = {name: (m.out_features, m.in_features) for name, m in block_linears(model).items()}
    mended = fix_adapter(tensors, config, shapes, model)
    assert_same(mended, {name: (A, 2 * B) for name, (A, B) in factors.items()})


def harmed(tensors: dict, config: dict, harm: str) -> None:
    experts = "base_model.model.model.layers.0.mlp.experts"
    if harm == "one of two":
        for half in "AB":
            del tensors[f"{experts}.base_layer.lora_{half}.weight"]
    elif harm == "none":
        config["target_parameters"].append("model.layers.7.mlp.experts.down_proj")
    elif harm == "stranger":
        config["target_parameters"].remove("model.layers.0.mlp.experts.gate_up_proj")
        config["target_parameters"].append("model.layers.0.mlp.experts.gate_up_proj_bias")
    elif harm == "rank":
        config["rank_pattern"]["model.layers.0.mlp.experts.down_proj"] = 7
    elif harm == "unsaid":
        del config["target_parameters"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("one of two", r"model.layers.0.mlp.experts are not those of its parameters down_proj, gate_up_proj"),
        ("none", r"there are no factors of model.layers.7.mlp.experts.down_proj \(target_parameters\)"),
        ("stranger", r"not those of its parameters down_proj, gate_up_proj_bias"),
        ("rank", r"are not those of experts of rank 7"),
        ("unsaid", r"model.layers.0.mlp.experts.* are not those of its parameters at all"),
    ],
)
def test_half_known_adapters_of_experts_are_refused_by_name(harm, words, tmp_path):
    model = mixture()
    unfold_experts(model)
    write_adapter(tmp_path, everywhere(model), "model", model=model)
    tensors, config = read_files(tmp_path)
    harmed(tensors, config, harm)
    with pytest.raises(EoraLabError, match=words):
        adapter_factors(tensors, config)
    shapes = {name: (m.out_features, m.in_features) for name, m in block_linears(model).items()}
    assert any(finding.loader == "any" for finding in check_adapter(tensors, config, shapes, model))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A saved Mixtral, `model`, and a run of it with ranks by budget, `run`."""
    folder = tmp_path_factory.mktemp("mixture")
    mixture().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    settings = SMALL | {"inputs": "original"}
    compress(load_model(folder / "model")[0], tiny_tokens(8), **settings, folder=folder / "run")
    return folder


@pytest.mark.parametrize("form", ["run", "plain", "universal"])
def test_a_run_s_adapter_is_used_in_every_form(form, place, tmp_path):
    folder = place / "run" / "adapter"
    if form != "run":
        folder = tmp_path / "out"
        flags = ["--universal"] if form == "universal" else []
        assert main(["adapter", "export", str(place / "run"), str(folder), *flags]) == 0
    model, _, _ = load_run(place / "run")
    wanted, own = logits(model, TOKENS), Adapters(model).factors()
    use_only(model, folder)
    torch.testing.assert_close(logits(model, TOKENS), wanted, rtol=1e-4, atol=1e-4)
    found = Adapters(model).factors()
    assert found.keys() == own.keys()
    use_only(model, "off")
    assert (logits(model, TOKENS) - wanted).norm() > 0.01 * wanted.norm()
    if form != "universal":  # in peft, on W^ in the plain model
        plain = mixture()
        dense = {n: layer.compressed.dense() for n, layer in compensated(model).items()}
        unfolded = copy.deepcopy(plain)
        unfold_experts(unfolded)
        for name, weight in dense.items():
            linear_at(unfolded, name).weight.data = weight
        plain.load_state_dict(unfolded.state_dict())
        wrapped = peft.PeftModel.from_pretrained(plain, folder).eval()
        torch.testing.assert_close(logits(wrapped, TOKENS), wanted, rtol=1e-4, atol=1e-4)


def test_check_and_fix_on_the_command_line(place, tmp_path, capsys):
    given = str(place / "run" / "adapter")
    assert main(["adapter", "check", given, "--model", str(place / "model")]) == 1
    captured = capsys.readouterr()
    assert "llama.cpp: its converter" in captured.out and "but for those of experts" in captured.err
    assert main(["adapter", "check", given, "--model", str(place / "run"), "--fix", str(tmp_path / "fixed")]) == 0
    model, _, _ = load_run(place / "run")
    wanted = logits(model, TOKENS)
    use_only(model, tmp_path / "fixed")
    torch.testing.assert_close(logits(model, TOKENS), wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_in_peft(tmp_path):
    plain = mixture()
    unfolded = copy.deepcopy(plain)
    unfold_experts(unfolded)
    factors = ragged(unfolded)
    write_adapter(tmp_path, factors, "model", model=unfolded)
    wanted, before = logits(merged(unfolded, factors), TOKENS), logits(plain, TOKENS)
    wrapped = peft.PeftModel.from_pretrained(plain.bfloat16(), tmp_path).eval()
    found = logits(wrapped, TOKENS).float()
    assert (found - wanted).norm() < 0.1 * (wanted - before).norm()
