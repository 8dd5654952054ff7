"""Mixtures: experts as linears, what they are measured by, and a pass over them."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from eora_lab import EoraLabError, InputStatistics, collect_statistics, generate, load_model, load_run, solve
from eora_lab.calibrate import experts
from eora_lab.calibrate.experts import Halves, draw_together
from eora_lab.calibrate.stream import BlockStream
from eora_lab.formats.dense import write_dense
from eora_lab.formats.gptq_checkpoint import write_checkpoint
from eora_lab.model.expert_kinds import unfold_experts
from eora_lab.model.experts import Experts
from eora_lab.run.adapters import Adapters
from tests.tiny import SMALL, compress, logits, tiny_tokenizer, tiny_tokens

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
MOE = SIZES | {"intermediate_size": 128, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": (transformers.MixtralConfig, SIZES | {"intermediate_size": 128, "num_local_experts": 4}),
    "gpt_oss": (  # (experts, in, out), gate and up interleaved, biases
        transformers.GptOssConfig,
        MOE | {"num_local_experts": 4, "head_dim": 16, "max_position_embeddings": 128},
    ),
    "llama4": (  # sorted rows
        transformers.Llama4TextConfig,
        MOE | {"num_local_experts": 4, "intermediate_size_mlp": 128, "head_dim": 16, "num_experts_per_tok": 1},
    ),
    "jetmoe": (  # one linear an expert
        transformers.JetMoeConfig,
        SIZES | {"intermediate_size": 128, "num_local_experts": 4, "kv_channels": 16, "num_experts_per_tok": 2},
    ),
    "dbrx": (  # experts below one another in a matrix
        transformers.DbrxConfig,
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "vocab_size": 97}
        | {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 2, "clip_qkv": 8}}
        | {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}},
    ),
    "longcat": (  # choices that pass the token on
        transformers.LongcatFlashConfig,
        {key: value for key, value in MOE.items() if key != "moe_intermediate_size"}
        | {"ffn_hidden_size": 128, "expert_ffn_hidden_size": 64, "n_routed_experts": 4, "zero_expert_num": 2}
        | {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
        | {"head_dim": 16, "num_key_value_heads": 4, "moe_topk": 2},
    ),
}


@torch.no_grad()
def mixture(kind: str = "mixtral", seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A tiny random model as transformers makes it, of weights large enough to tell experts apart."""
    config, settings = MIXTURES[kind]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config(**settings | changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.1)
        elif not parameter.isfinite().all() or not parameter.any():
            parameter.normal_(0, 0.02)
    return model


@pytest.fixture
def saved(tmp_path):
    mixture().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_become_linears_and_compute_the_same(kind):
    model, tokens = mixture(kind), tiny_tokens(3)
    before, state = logits(model, tokens), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    unfold_experts(model)
    assert any(isinstance(module, Experts) for module in model.modules())
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-5, atol=1e-6)
    assert not [name for name, parameter in model.named_parameters() if "expert" in name and parameter.ndim == 3]
    after = model.state_dict()  # fused again
    assert state.keys() == after.keys() and all(torch.equal(state[key], after[key]) for key in state)
    other = mixture(kind, seed=1)
    unfold_experts(other)
    other.load_state_dict(state)
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    names = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    unfold_experts(model)  # once is enough
    assert names == [name for name, module in model.named_modules() if isinstance(module, Experts)]


def test_a_loaded_mixture_is_saved_as_it_was(saved):
    model, _ = load_model(saved / "model")
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
    model.save_pretrained(saved / "again")
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved / "again", dtype=torch.float32).eval()
    assert torch.equal(logits(plain, tiny_tokens(2)), logits(mixture(), tiny_tokens(2)))


class UnknownExperts(torch.nn.Module):
    """Of a kind that multiplies in a way of its own."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(4, 256, 64) / 8)
        self.down_proj = torch.nn.Parameter(torch.randn(4, 64, 128) / 8)
        self.act_fn = torch.nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        gate, up = (hidden_states @ self.gate_up_proj[top_k_index[:, 0]].mean(0).T).chunk(2, -1)
        return (self.act_fn(gate) * up) @ self.down_proj.sum(0).T


def test_experts_of_an_unknown_kind_are_refused_by_name():
    model = mixture()
    for block in model.model.layers:
        block.mlp.experts = UnknownExperts()
    with pytest.raises(EoraLabError, match=r"layers\.0\.mlp\.experts\.\w+ fuses all experts in one \(4, "):
        compress(model, tiny_tokens(), **SMALL)


def routed(model, tokens) -> dict[str, tuple[torch.Tensor, int]]:
    """Module name -> sum of x xᵀ in plain forward passes, and tokens."""
    found = {}

    def hook(name):
        def note(_module, args):
            x = args[0].double()
            S, n = found.get(name, (0, 0))
            found[name] = S + x.T @ x, n + len(x)

        return note

    named = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".experts." in n]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in named]
    for part in tokens.split(4):
        logits(model, part)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("samples", [1, 6, 9])
def test_an_expert_is_measured_by_its_own_tokens_and_those_of_its_layer(samples):
    model, tokens = mixture(), tiny_tokens(samples)
    found = collect_statistics(model, tokens, progress=False)
    true = routed(model, tokens)
    for leaf in ("gate_up_proj", "down_proj"):
        names = [f"model.layers.1.mlp.experts.{index}.{leaf}" for index in range(4)]
        layer = sum(true[name][0] for name in names)
        total = sum(true[name][1] for name in names)
        assert total == 2 * tokens.numel()
        for name in names:
            one, (S, n) = found[name], true[name]
            assert one.tokens == n
            k = one.pooled_tokens
            torch.testing.assert_close(
                one.second_moment.double(), (S + k * layer / total) / (n + k), rtol=1e-5, atol=1e-5
            )


def starved() -> transformers.PreTrainedModel:
    """A mixture that chooses one expert a token, and in its second block never expert 2."""
    model = mixture(num_experts_per_tok=1)
    router = model.model.layers[1].mlp.gate
    with torch.no_grad():
        router.weight[2] = router.weight[[0, 1, 3]].mean(0)  # a mean is never above all
    return model


def test_an_expert_without_tokens_is_compressed_by_those_of_its_layer():
    tokens, errors = tiny_tokens(8), {}
    for method in ("none", "eora"):
        model = starved()
        report = compress(model, tokens, **SMALL | {"method": method})
        errors[method] = float((logits(model, tokens) - logits(starved(), tokens)).norm())
    assert errors["eora"] < errors["none"]
    layers = {layer.name: layer for layer in report.layers}
    alone = layers["model.layers.1.mlp.experts.2.gate_up_proj"]
    assert (alone.tokens, alone.data_free) == (0, False) and alone.pooled_tokens > 0
    said = "saw no token, and were compressed by those of their layer: model.layers.1.mlp.experts.2.gate_up_proj"
    assert said in report.summary()


def test_an_expert_without_held_out_tokens_is_judged_by_those_of_its_layer():
    report = compress(starved(), tiny_tokens(8), **SMALL | {"held_out": 0.25, "shrink": True})
    layers = {layer.name: layer for layer in report.layers}
    alone = layers["model.layers.1.mlp.experts.2.down_proj"]
    assert (alone.tokens, alone.data_free) == (0, False) and 0 < alone.held_out_after < alone.held_out_before


@pytest.mark.parametrize("compressor", ["rtn", "gptq", "wanda"])
def test_a_compressed_mixture_is_read_back_to_the_bit(compressor, saved):
    model, _ = load_model(saved / "model")
    settings = {"bits": 16, "sparsity": "2:4"} if compressor == "wanda" else {"bits": 4}
    report = compress(model, tiny_tokens(8), compressor, folder=saved / "run", **SMALL | settings)
    assert report.coverage > 0.99
    again, _, _ = load_run(saved / "run")
    assert torch.equal(logits(again, tiny_tokens(2)), logits(model, tiny_tokens(2)))


@pytest.mark.parametrize("merge", [False, True])
def test_a_compressed_mixture_is_exported_as_transformers_reads_it(merge, saved):
    compress(load_model(saved / "model")[0], tiny_tokens(8), folder=saved / "run", **SMALL)
    model, tokenizer, _ = load_run(saved / "run")
    write_dense(saved / "out", model, tokenizer, torch.float32, merge)
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved / "out", dtype=torch.float32).eval()
    if not merge:
        Adapters(model).use(None)
    torch.testing.assert_close(logits(plain, tiny_tokens(2)), logits(model, tiny_tokens(2)), rtol=1e-4, atol=1e-5)


def test_a_gptq_checkpoint_holds_no_experts_but_what_is_beside_them(saved):
    grid = {"bits": 4, "sym": True, "zero_point": "integer", "scale_dtype": "float16"}
    for skip in ("", r"\.experts\."):
        model, tokenizer = load_model(saved / "model")
        compress(model, tiny_tokens(8), **SMALL | grid, skip=skip)
        if not skip:
            with pytest.raises(EoraLabError, match=r"experts\.0\.gate_up_proj is of an expert, .* use format dense"):
                write_checkpoint(saved / "out", model, tokenizer)
            continue
        write_checkpoint(saved / "out", model, tokenizer)
        found, before = (load_file(saved / folder / "model.safetensors") for folder in ("out", "model"))
        assert "model.layers.0.self_attn.q_proj.qweight" in found
        assert [key for key in found if "experts" in key] == [key for key in before if "experts" in key]


def test_a_mixture_is_compressed_in_bfloat16_and_written_token_by_token(saved):
    model, tokenizer = load_model(saved / "model", "bfloat16")
    compress(model, tiny_tokens(8), folder=saved / "run", **SMALL)
    again = load_run(saved / "run", "bfloat16")[0]
    assert torch.equal(logits(again, tiny_tokens(2)), logits(model, tiny_tokens(2)))
    texts = [generate(one, tokenizer, "fox", tokens=4) for one in (again, model)]
    assert texts[0] == texts[1]


def test_experts_are_measured_together_step_by_step():
    model = mixture()
    unfold_experts(model)
    groups = BlockStream(model, tiny_tokens(2)).groups(0)
    assert [f"mlp.experts.{index}.gate_up_proj" for index in range(4)] in groups
    assert [f"mlp.experts.{index}.down_proj" for index in range(4)] in groups
    report = compress(model, tiny_tokens(8), **SMALL | {"true_sequential": True})
    assert len(report.layers) == len({layer.name for layer in report.layers}) == 2 * (4 + 8)


def test_experts_share_one_second_moment_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(experts, "BOUND", 4 * 64 * 64 * 4 - 1)
    model, tokens = mixture(), tiny_tokens(6)
    found = collect_statistics(model, tokens, progress=False)
    names = [f"model.layers.0.mlp.experts.{index}.gate_up_proj" for index in range(4)]
    assert len({id(found[name]) for name in names}) == 1 and found[names[0]].tokens == 2 * tokens.numel()
    layer = sum(routed(model, tokens)[name][0] for name in names) / (2 * tokens.numel())
    torch.testing.assert_close(found[names[3]].second_moment.double(), layer, rtol=1e-5, atol=1e-5)


CHANNELS, TOKENS = 32, (2000, 400, 60, 20)


def alike(apart: float, seed: int = 0) -> list[torch.Tensor]:
    """Roots T_e of second moments of four experts, as far apart as that: 0 for one and the same."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(CHANNELS, CHANNELS, generator=generator) * torch.logspace(0, -2, CHANNELS)[:, None]
    return [common + apart * torch.randn(CHANNELS, CHANNELS, generator=generator) * common.norm() / CHANNELS
            for _ in TOKENS]  # fmt: skip


def measured(roots: list[torch.Tensor], drawn: str) -> list[InputStatistics]:
    """Statistics of few tokens of each expert: routed alone, of the layer alone, or drawn together."""
    generator, halves = torch.Generator().manual_seed(1), []
    for root, tokens in zip(roots, TOKENS, strict=True):
        halves.append(Halves(InputStatistics(CHANNELS)))
        for part in halves[-1].parts:
            part.update(torch.randn(tokens // 2, CHANNELS, generator=generator) @ root.T)
        halves[-1].join()
    found = [half.whole for half in halves]
    if drawn == "layer":
        layer = experts.pooled(found)
        return [layer for _ in found]
    if drawn == "shrunk":
        draw_together(found, halves)
    return found


def left_over(roots: list[torch.Tensor], drawn: str) -> float:
    """Output error that EoRA leaves of an error R, on the true distribution of each expert."""
    generator, total = torch.Generator().manual_seed(2), 0.0
    for root, statistics in zip(roots, measured(roots, drawn), strict=True):
        R = torch.randn(24, CHANNELS, generator=generator)
        left = R - solve("eora", R, statistics, 6).dense()
        total += float((left @ root).pow(2).sum() / (R @ root).pow(2).sum())
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shrunk_statistics_beat_routed_tokens_alone_and_the_layer_alone(seed):
    roots = alike(0.7, seed)
    shrunk = left_over(roots, "shrunk")
    assert shrunk < left_over(roots, "routed") and shrunk < left_over(roots, "layer")


def test_equal_experts_are_taken_for_one_and_others_are_left_apart():
    same, apart = (measured(alike(difference), "shrunk") for difference in (0.0, 20.0))
    assert same[0].pooled_tokens == max(experts.STRENGTHS) * CHANNELS and apart[0].pooled_tokens < CHANNELS
