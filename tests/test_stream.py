"""The stream equals the model: layers see in it what they see in plain forward passes, or the model is refused."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn

from eora_lab import EoraLabError, Report, collect_statistics
from eora_lab.calibrate.contract import check_blocks
from eora_lab.calibrate.stream import BlockStream
from eora_lab.cli import main
from eora_lab.layer.linear import compensated
from eora_lab.model.structure import block_linears, decoder_blocks
from eora_lab.run.budget import Budget
from eora_lab.run.ranks import plan_ranks
from eora_lab.run.recipe import Recipe
from tests.tiny import SMALL, compress, logits, tiny_model, tiny_tokenizer, tiny_tokens

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = SIZES | {
    "head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
}  # fmt: skip
VISION = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
MLLAMA_TEXT = SIZES | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
MODELS: dict[str, tuple[str, dict]] = {
    # inputs of every layer's own, keys and values shared by layers
    "gemma4": ("Gemma4TextConfig", GEMMA | {"global_head_dim": 16}),
    # the same, and hidden states of (4, batch, seqlen, hidden_size)
    "gemma3n": ("Gemma3nTextConfig", GEMMA | {
        "intermediate_size": [64] * 4, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    }),
    # hybrid blocks that read the embeddings again, and tie their weights
    "zamba2": ("Zamba2Config", SIZES | {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "kv_channels": 16,
        "attention_hidden_size": 64, "attention_head_dim": 32, "mamba_d_state": 8, "mamba_headdim": 32,
        "mamba_ngroups": 1, "n_mamba_heads": 2, "chunk_size": 8,
    }),
    # blocks that return a tuple
    "bamba": ("BambaConfig", SIZES | {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "attn_layer_indices": [1],
    }),
    "cpmant": ("CpmAntConfig", {
        "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 2, "dim_head": 16, "dim_ff": 64,
        "num_hidden_layers": 2, "prompt_length": 4, "prompt_types": 4, "segment_types": 4,
    }),
    # a weight that the model reads itself
    "mamba": ("MambaConfig", {
        "vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4,
    }),
    "falcon_mamba": ("FalconMambaConfig", {
        "vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4,
    }),
    "hrm_text": ("HrmTextConfig", SIZES | {"num_hidden_layers": 2}),
    # a vision tower that is the larger stack
    "gemma3": ("Gemma3Config", {
        "text_config": {key: GEMMA[key] for key in (*SIZES, "head_dim", "sliding_window", "layer_types")},
        "vision_config": VISION | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4,
    }),
    "mllama": ("MllamaConfig", {
        "text_config": MLLAMA_TEXT,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0],
            "vision_output_dim": 64, "supported_aspect_ratios": [[1, 1]],
        },
    }),
}  # fmt: skip


def model_of(kind: str) -> transformers.PreTrainedModel:
    """A small random model, in which what a layer adds counts."""
    name, settings = MODELS[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"the installed transformers has no {name}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**copy.deepcopy(settings)))
    for name, parameter in model.requires_grad_(False).named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.1)
        elif name.endswith("correct_output_scale"):  # of Gemma 3n, zero at first
            parameter.fill_(1)
    return model.float().eval()


def seen_by(model: nn.Module, modules: dict[str, nn.Module], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Module name -> its inputs in plain forward passes, one of every sample: (tokens, in_features)."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, module in modules.items()
    ]
    for sample in tokens.split(1):
        logits(model, sample)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs).double() for name, inputs in seen.items()}


@pytest.mark.parametrize("samples", [1, 4, 6, 9])
@pytest.mark.parametrize("kind", ["gemma4", "gemma3n", "zamba2", "bamba", "cpmant", "mamba"])
def test_statistics_are_those_of_plain_forward_passes(kind, samples):
    model, tokens = model_of(kind), tiny_tokens(samples, 24)
    found = collect_statistics(model, tokens, progress=False)
    seen = seen_by(model, block_linears(model), tokens)
    assert len(seen) >= 4 * (len(decoder_blocks(model)) - 1)
    for name, x in seen.items():
        exact = x.T @ x / len(x)
        assert found[name].tokens == len(x)
        assert (found[name].second_moment.double() - exact).norm() <= 1e-5 * exact.norm(), name
    for name in found.keys() - seen.keys():
        assert found[name].tokens == 0


@pytest.mark.parametrize("kind", ["gemma4", "gemma3n", "zamba2", "bamba", "cpmant", "falcon_mamba", "gemma3"])
def test_a_compressed_block_hands_on_what_the_compressed_model_does(kind):
    model, original, tokens = model_of(kind), model_of(kind), tiny_tokens(6, 24)
    report = compress(model, tokens, **SMALL | {"group_size": 8, "rank": 2}, true_sequential=True)
    seen = seen_by(model, compensated(model), tokens)
    assert len(report.layers) == len(compensated(model))
    judged = 0
    for layer in report.layers:
        if layer.data_free or layer.name.endswith("modality_router"):  # which runs twice, on what it made of its input
            continue
        x, module = seen[layer.name], model.get_submodule(layer.name)
        S, W = x.T @ x / len(x), original.get_submodule(layer.name).weight.double()
        left = W - module.dense().double() - module.lora_B.double() @ module.lora_A.double()
        assert layer.error_after == pytest.approx(((left @ S * left).sum() / (W @ S * W).sum()).item(), rel=1e-3)
        judged += 1
    assert judged >= 4 * len(decoder_blocks(original)) - 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hrm_text", r"^model\.L_module\.layers\.0 runs 6 times in a pass"),
        ("mllama", r"^model\.layers\.1 does not run on text alone"),
    ],
)
def test_models_whose_blocks_do_not_run_one_by_one_are_refused(kind, message):
    model, tokens = model_of(kind), tiny_tokens(2, 24)
    for run in (lambda: collect_statistics(model, tokens), lambda: compress(model, tokens, **SMALL)):
        with pytest.raises(EoraLabError, match=message):
            run()
    assert not compensated(model)


def test_the_text_decoder_is_found_beside_a_larger_vision_tower():
    model = model_of("gemma3")
    assert list(decoder_blocks(model)) == [f"model.language_model.layers.{i}" for i in range(4)]
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    assert tower > sum(p.numel() for p in model.model.language_model.layers.parameters())


class Block(nn.Module):
    """A residual block that may keep to the contract of decoder blocks or not."""

    def __init__(self, fault: str, memory: list):
        super().__init__()
        self.up, self.down, self.fault, self.memory = nn.Linear(32, 32), nn.Linear(32, 32), fault, memory

    def forward(self, x, extra=None):
        if self.fault == "in place":
            return x.add_(self.down(self.up(x)))
        if self.fault == "module state":  # of the mini-batch that ran last
            self.memory.append(x) if not self.memory else None
            added = self.memory[0]
            if len(self.memory) == 1 and self is self.last:
                self.memory.clear()
            return x + self.down(self.up(added))
        if self.fault == "counts":
            self.memory.append(1)
            return x + len(self.memory) * self.down(self.up(x))
        hidden = self.up(x)
        if self.fault == "shares some inputs":
            return x + self.down(x) + self.up(hidden)
        y = x + self.down(hidden) + (0 if extra is None else extra)
        return (y, hidden) if "hands on" in self.fault else y


class Model(nn.Module):
    """Embeddings, three blocks and a head, with a fault in how the blocks are run."""

    def __init__(self, fault: str):
        super().__init__()
        torch.manual_seed(0)
        memory: list = []
        self.embed, self.blocks = nn.Embedding(97, 32), nn.ModuleList(Block(fault, memory) for _ in range(3))
        self.head, self.fault = nn.Linear(32, 97), fault
        for block in self.blocks:
            object.__setattr__(block, "last", self.blocks[-1])
        if fault == "shared module":
            self.blocks[2].up = self.blocks[0].up

    def forward(self, tokens, use_cache=False):
        x = self.embed(tokens)
        if "hands on" in self.fault:
            extra = None
            for block in self.blocks:
                x, extra = block(x, extra if extra is None or self.fault == "hands on more" else 2 * extra)
            return self.head(x)
        for i, block in enumerate(self.blocks):
            if self.fault == "argument of a block's output":
                x = block(x, x.mean(-1, keepdim=True))
            elif self.fault == "other order":
                x = self.blocks[2 - i](x)
            else:
                x = block(x)
            if self.fault == "between blocks":
                x = 2 * x
        return self.head(x)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("in place", r"^blocks\.0 gives other hidden states by itself"),
        ("module state", r"^blocks\.\d gives other hidden states by itself"),
        ("counts", r"^blocks\.0 gives other hidden states by itself"),
        ("hands on what the model changes", r"^blocks\.1 gives other hidden states by itself"),
        ("argument of a block's output", r"^blocks\.1 gives other hidden states by itself"),
        ("between blocks", r"^blocks\.1 gives other hidden states by itself"),
        ("other order", r"^blocks\.2 runs before blocks\.0"),
        ("shared module", r"^blocks\.2\.up is a module of blocks\.0 as well"),
    ],
)
def test_a_block_that_cannot_be_streamed_exactly_is_refused_by_name(fault, message):
    model = Model(fault)
    with pytest.raises(EoraLabError, match=message):
        compress_small(model)
    assert all(type(one) is nn.Linear for one in block_linears(model).values())


def test_blocks_without_such_a_fault_are_not():
    assert len(compress_small(Model("none")).layers) == 6


@pytest.mark.parametrize("samples", [1, 4, 6, 9])
def test_what_a_block_hands_on_beside_hidden_states_reaches_the_next_one(samples):
    """As the blocks before make it, also after they were changed."""
    model, tokens, inputs = Model("hands on more"), tiny_tokens(samples), []
    stream = BlockStream(model, tokens)
    with torch.no_grad():
        stream.statistics(0, keep_outputs=False)  # the block runs, is changed, and runs again
        model.blocks[0].up.weight.mul_(2)
        for index in (0, 1):
            stream.advance(index)
        found = stream.statistics(2, keep_outputs=False)
        model.blocks[2].down.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].flatten(0, -2)))
        model(tokens)
    x = torch.cat(inputs)
    torch.testing.assert_close(found["blocks.2.down"].second_moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    assert len(compress_small(Model("hands on more")).layers) == 6


@pytest.mark.parametrize("samples", [1, 6])
def test_linears_that_share_some_of_their_inputs_are_measured_apart(samples):
    model, tokens, inputs = Model("shares some inputs"), tiny_tokens(samples), {"up": [], "down": []}
    found = collect_statistics(model, tokens, progress=False)
    for name, seen in inputs.items():
        layer = model.blocks[1].get_submodule(name)
        layer.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    for name, seen in inputs.items():
        x = torch.cat(seen)
        assert found[f"blocks.1.{name}"].tokens == len(x) == tokens.numel() * (2 if name == "up" else 1)
        torch.testing.assert_close(found[f"blocks.1.{name}"].second_moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def compress_small(model: nn.Module):
    return compress(model, tiny_tokens(), **SMALL | {"rank": 2})


def test_a_model_that_fails_on_tokens_alone_is_refused_in_one_line():
    with pytest.raises(EoraLabError, match=r"^Model does not run on these tokens alone: index out of range"):
        check_blocks(Model("none"), torch.full((1, 8), 97))


def test_a_model_wrapped_by_peft_is_refused():
    import peft

    settings = peft.LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(EoraLabError, match=r"q_proj is wrapped by peft: merge the adapter first"):
        compress(peft.get_peft_model(tiny_model("llama"), settings), tiny_tokens(), **SMALL)


class Scaled(nn.Linear):
    """A linear by name, which multiplies in a way of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Cast(nn.Linear):
    """A linear with a forward of its own that comes to the same."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def test_linears_that_are_no_plain_product_stay_as_they_are():
    model, tokens = Model("none"), tiny_tokens()
    model.blocks[0].up, model.blocks[1].up = Scaled(32, 32), Cast(32, 32)
    assert check_blocks(model, tokens).left == {"blocks.0.up"}
    report = compress_small(model)
    assert isinstance(model.blocks[0].up, Scaled) and len(compensated(model)) == 5
    assert report.left == {"blocks.*.up.weight": 32 * 32, "head.weight": 97 * 32}  # a head that the model does not name


def test_mamba_keeps_the_weights_that_it_reads_and_says_so():
    model, original = model_of("mamba"), model_of("mamba")
    report = compress(model, tiny_tokens(), **SMALL | {"rank": 2, "group_size": 8})
    assert {name.rsplit(".", 1)[1] for name in compensated(model)} == {"in_proj", "x_proj", "out_proj"}
    kept = "backbone.layers.1.mixer.dt_proj.weight"
    assert torch.equal(model.state_dict()[kept], original.state_dict()[kept])
    blocks = original.backbone.layers
    assert report.left["backbone.layers.*.mixer.dt_proj.weight"] == 2 * blocks[0].mixer.dt_proj.weight.numel()
    assert report.weights + sum(report.left.values()) == sum(p.numel() for p in blocks.parameters() if p.ndim > 1)
    assert report.coverage == report.weights / (report.weights + sum(report.left.values())) < 0.95
    assert "of the decoder's weights in matrices compressed; left as they are: backbone.layers.*" in report.summary()


def test_linears_that_stay_as_they_are_have_no_statistics_and_no_rank():
    model, tokens = model_of("mamba"), tiny_tokens(4, 24)
    statistics = collect_statistics(model, tokens, progress=False)
    recipe = Recipe("rtn", bits=3, group_size=8, rank=2, inputs="original")
    ranks = plan_ranks(model, statistics, recipe, Budget("relative", multiple=1), progress=False)
    assert ranks.keys() == statistics.keys() == {name for name in block_linears(model) if "dt_proj" not in name}
    del statistics["backbone.layers.1.mixer.in_proj"]
    with pytest.raises(EoraLabError, match=r"^backbone\.layers\.1\.mixer\.in_proj: no statistics"):
        plan_ranks(model, statistics, recipe, Budget("relative", multiple=1), progress=False)


def test_places_that_share_a_transformer_keep_what_they_do_not_run():
    model, tokens = model_of("zamba2"), tiny_tokens(4, 24)
    before, linears = logits(model, tokens), block_linears(model)
    left = check_blocks(model, tokens).lent
    assert left == {f"model.layers.{place}.shared_transformer.feed_forward.gate_up_proj_adapter_list.{other}.{i}"
                    for place, other in ((1, 1), (3, 0)) for i in (0, 1)}  # fmt: skip
    report = compress(model, tokens, **SMALL | {"bits": 8, "rank": 2, "group_size": 8})
    assert {layer.name for layer in report.layers} == linears.keys() - left
    assert not any(layer.data_free for layer in report.layers)
    assert set(report.left) == {
        "model.layers.*.mamba.conv1d.weight",
        "model.layers.*.mamba_decoder.mamba.conv1d.weight",
    }
    assert (logits(model, tokens) - before).norm() < 0.05 * before.norm()


def test_a_model_that_changes_its_own_weights_is_refused():
    """As RWKV does, which halves them block by block at its first pass."""
    config = transformers.RwkvConfig(vocab_size=97, hidden_size=64, attention_hidden_size=64, num_hidden_layers=8)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with pytest.raises(EoraLabError, match=r"attention\.output\.weight is changed by the model itself as it runs"):
        compress(model, tiny_tokens(), **SMALL)


def test_gradients_reach_the_input_of_a_falcon():
    """It adds to the output of a linear in place."""
    config = transformers.FalconConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    tokens = tiny_tokens()
    compress(model, tokens, **SMALL | {"rank": 0, "method": "none"})
    dense = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    dense.load_state_dict(model.state_dict() | {f"{n}.weight": m.dense() for n, m in compensated(model).items()}, False)
    gradients = []
    for one in (model, dense):
        x = one.get_input_embeddings()(tokens).requires_grad_()
        one(inputs_embeds=x).logits.square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert gradients[0].abs().max() > 0


def test_the_command_line_warns_of_a_model_that_was_compressed_in_part(workplace, capsys):
    model_of("mamba").save_pretrained("mamba")
    tiny_tokenizer().save_pretrained("mamba")
    texts = ["--calibration.source", "text.txt", "--calibration.nsamples", "4", "--calibration.seqlen", "32"]
    small = ["--group-size", "8", "--rank", "2", "--no-evaluate"]
    for name, warned in (("mamba", True), ("model", False)):
        assert main(["compress", f"run-{name}", "--model", name, *small, *texts]) == 0
        assert ("warning: only" in capsys.readouterr().err) == warned
    report = json.loads((workplace / "run-mamba/report.json").read_text())
    assert report["coverage"] < 0.95 and "backbone.layers.*.mixer.dt_proj.weight" in report["left"]
    whole = Report.from_json((workplace / "run-model/report.json").read_text())
    assert whole.coverage == 1 and "100.0% of the decoder's weights in matrices compressed" in whole.summary()
    older = {key: value for key, value in json.loads(whole.to_json()).items() if key not in ("coverage", "left")}
    assert Report.from_json(json.dumps(older)).coverage is None
    assert "of the decoder's" not in Report.from_json(json.dumps(older)).summary()


@pytest.mark.parametrize("ordered", [False, True])
def test_a_block_that_takes_its_sequences_one_by_one_is_measured_whole(ordered):
    """How often its linears run depends on the mini-batch: none is ended before all its tokens have come."""
    model, tokens = tiny_model("llama"), tiny_tokens(10)
    for block in decoder_blocks(model).values():
        whole = block.mlp.forward
        block.mlp.forward = lambda x, whole=whole: torch.cat([whole(one[None]) for one in x])
    stream = BlockStream(model, tokens, held_out=0.4)  # mini-batches of 4, 2 and 4 sequences
    if ordered:
        stream.groups(0)
    found = stream.statistics(0, keep_outputs=False)
    assert {one.tokens for one in found.values()} == {6 * tokens.shape[1]}
    assert {one.held_out.tokens for one in found.values()} == {4 * tokens.shape[1]}
