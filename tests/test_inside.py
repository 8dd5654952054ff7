"""What compression breaks inside: surprises, residual stream, logit lens and heads, against slow exact computations."""

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import kl_div
from torch.overrides import _get_current_function_mode_stack

from eora_lab import (
    Adapters,
    EoraLabError,
    ResidualStream,
    head_errors,
    head_outputs,
    perplexity,
    read_lens,
    residual_stream,
    stream_errors,
    token_losses,
    window_losses,
)
from eora_lab.model.structure import decoder_blocks
from eora_lab.model.unfold import unfold
from tests.tiny import SMALL, compress, logits, tiny_model, tiny_tokens

COMMON = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
COMMON |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    # logits and attention are capped, and heads are no part of the hidden size
    "gemma2": (transformers.Gemma2Config, {"num_key_value_heads": 2, "head_dim": 32, "final_logit_softcapping": 5.0}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "neox": (transformers.GPTNeoXConfig, {}),
    "bloom": (transformers.BloomConfig, {"n_layer": 2, "n_head": 4}),  # attention written out
    "mla": (transformers.DeepseekV3Config, {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 24, "num_key_value_heads": 4, "first_k_dense_replace": 2}),
    # a gate on what each head gives
    "gated": (transformers.Qwen3NextConfig, {"num_key_value_heads": 2, "head_dim": 16, "mlp_only_layers": [0, 1],
              "layer_types": ["full_attention"] * 2}),
}  # fmt: skip
KINDS = ("llama", "qwen2", "gemma", *OTHERS)
TOKENS = tiny_tokens(1, 24)[0]


def model_of(kind: str) -> nn.Module:
    if kind not in OTHERS:
        return tiny_model(kind)
    config, extra = OTHERS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**COMMON | extra)).eval().requires_grad_(False)
    for parameter in model.parameters():  # so that norms and biases matter
        parameter.add_(0.05 * torch.randn_like(parameter))
    unfold(model)
    return model


@pytest.fixture(scope="module")
def mended():
    """(dense model, the same in 3 bits with a path of rank 8)."""
    model = tiny_model("llama")
    compress(model, tiny_tokens(), **SMALL)
    return tiny_model("llama"), model


@pytest.fixture(params=[False, True], ids=["dense", "compressed"])
def either(request, mended):
    return mended[request.param]


# --- surprise ------------------------------------------------------------------------------------------------------


def test_the_surprises_of_tokens_are_the_loss_that_perplexity_measures(either):
    windows = tiny_tokens(3, 24, seed=2)
    found = token_losses(either, windows)
    exact = logits(either, windows).double().log_softmax(-1)[:, :-1].gather(2, windows[:, 1:, None])[..., 0].neg()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean(1), window_losses(either, windows), rtol=1e-12, atol=0)
    assert math.isclose(found.mean().exp().item(), perplexity(either, windows), rel_tol=1e-12)


# --- residual stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_is_what_transformers_calls_hidden_states(kind):
    model = model_of(kind)
    stream = residual_stream(model, TOKENS.tolist())
    assert list(stream.states) == list(decoder_blocks(model)) and torch.equal(stream.tokens, TOKENS)
    hidden = model(TOKENS[None], output_hidden_states=True, use_cache=False).hidden_states
    for states, wanted in zip([*stream.states.values()][:-1], hidden[1:-1], strict=True):  # the last one is normed
        assert torch.equal(states, wanted)


def test_a_stream_does_not_differ_from_itself_and_a_path_brings_it_nearer(mended):
    dense, model = mended
    own = residual_stream(dense, TOKENS)
    assert stream_errors(own, residual_stream(dense, TOKENS)).count_nonzero() == 0
    paths, found = Adapters(model), {}
    for label, path in (("none", None), ("eora", "own")):
        paths.use(path)
        found[label] = stream_errors(own, residual_stream(model, TOKENS))
    assert found["none"].shape == (2, 24) and found["none"].dtype == torch.float64
    assert (found["eora"].mean(1) < found["none"].mean(1)).all()


@given(st.floats(-0.5, 0.5), st.integers(2, 7))
def test_a_stream_that_grew_by_a_share_is_off_by_that_share_wherever_tokens_lie(share, seqlen):
    tokens, states = torch.arange(seqlen), torch.randn(seqlen, 3, 8).double()
    after, before = states[None], states.movedim(1, 0)[:, None]  # several streams after the tokens, and before them
    for layout in (after, before):
        one, other = (ResidualStream(tokens, {"b": layout * factor}) for factor in (1, 1 + share))
        if seqlen == 3 and layout is before:  # three streams of three tokens
            with pytest.raises(EoraLabError, match="which are they"):
                stream_errors(one, other)
            continue
        assert torch.equal(one.by_token("b"), states.flatten(1))
        found = stream_errors(one, other)
        torch.testing.assert_close(
            found, torch.full((1, seqlen), abs(share), dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


# --- logit lens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_lens_after_the_last_block_is_the_output_of_the_model(kind):
    model, other = model_of(kind), model_of(kind)
    for block in decoder_blocks(other).values():
        for parameter in block.parameters():
            parameter.requires_grad_(False).mul_(1.5)
    streams = {"dense": residual_stream(model, TOKENS), "other": residual_stream(other, TOKENS)}
    found = read_lens(model, streams)
    p, q = (logits(one, TOKENS[None])[0].double().log_softmax(1) for one in (model, other))
    assert torch.equal(found["dense"].answers[-1], p.argmax(1)) and torch.equal(found["other"].answers[-1], q.argmax(1))
    exact = kl_div(q, p, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(found["other"].divergence[-1].double(), exact, rtol=1e-3, atol=1e-6)
    assert exact.max() > 1e-4 and found["dense"].divergence.count_nonzero() == 0


def test_the_lens_after_any_block_is_norm_and_head_of_its_states(mended):
    dense, model = mended
    streams = {"dense": residual_stream(dense, TOKENS), "mended": residual_stream(model, TOKENS)}
    found = read_lens(model, streams)["mended"]
    for block, (name, states) in enumerate(streams["mended"].states.items()):
        p, q = (
            dense.lm_head(dense.model.norm(s))[0].double().log_softmax(1)
            for s in (streams["dense"].states[name], states)
        )
        exact = kl_div(q, p, reduction="none", log_target=True).sum(1)
        torch.testing.assert_close(found.divergence[block].double(), exact, rtol=1e-3, atol=1e-6)
        assert torch.equal(found.answers[block], q.argmax(1))


def test_a_model_whose_output_needs_more_than_the_last_block_has_no_lens():
    model, seen = tiny_model("llama"), {}
    streams = {"dense": residual_stream(model, TOKENS)}
    model.model.layers[0].register_forward_hook(lambda _m, _a, out: seen.update(first=out))
    model.model.norm.register_forward_pre_hook(lambda _m, args: args[0] + seen["first"])
    with pytest.raises(EoraLabError, match=r"LlamaForCausalLM has no logit lens: .* last block alone"):
        read_lens(model, streams)


# --- heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_the_heads_sum_up_to_what_attention_adds(kind):
    model, outputs = model_of(kind), {}
    heads = head_outputs(model, TOKENS)
    assert len(heads) == 2
    for name in heads:
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: outputs.update({name: out[0]}))
    logits(model, TOKENS[None])
    for name, z in heads.items():
        assert z.shape[:2] == (24, 4)
        projection = model.get_submodule(name)
        weight = projection.weight.unflatten(1, z.shape[1:]).double()  # (out, heads, head_dim)
        parts = torch.einsum("thd,ohd->hto", z.double(), weight)
        bias = 0 if projection.bias is None else projection.bias.double()
        torch.testing.assert_close(parts.sum(0) + bias, outputs[name].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_each_head_is_its_probabilities_times_the_values_of_its_group(kind):
    model, values = tiny_model(kind), []
    heads = head_outputs(model, TOKENS)
    model.set_attn_implementation("eager")
    for block in model.model.layers:
        block.self_attn.v_proj.register_forward_hook(lambda _m, _a, out: values.append(out[0]))
    with torch.no_grad():
        probabilities = model(TOKENS[None], output_attentions=True, use_cache=False).attentions
    for z, p, v in zip(heads.values(), probabilities, values, strict=True):
        groups = model.config.num_key_value_heads
        v = v.unflatten(1, (groups, -1)).repeat_interleave(4 // groups, dim=1)  # (seqlen, heads, head_dim)
        torch.testing.assert_close(z, torch.einsum("hts,shd->thd", p[0], v), rtol=1e-4, atol=1e-5)
    assert head_outputs(model, TOKENS).keys() == heads.keys()  # written out, too


@pytest.mark.parametrize("kind, rows", [("llama", 16), ("gemma", 32), ("mla", 16), ("gated", 32)])  # of a head
def test_a_head_that_was_changed_is_the_one_that_is_off(kind, rows):
    model, other = model_of(kind), model_of(kind)
    attention = other.model.layers[1].self_attn
    queries = attention.q_b_proj if kind == "mla" else attention.q_proj
    queries.weight.data[rows : 2 * rows] *= -1  # the second of four heads
    errors = head_errors(head_outputs(model, TOKENS), head_outputs(other, TOKENS))
    first, second = errors.values()
    assert first.count_nonzero() == 0 and (second > 0).tolist() == [False, True, False, False]


def test_a_compressed_model_has_the_heads_of_the_dense_one_and_a_path_mends_them(mended):
    dense, model = mended
    own, paths, found = head_outputs(dense, TOKENS), Adapters(model), {}
    for label, path in (("none", None), ("eora", "own")):
        paths.use(path)
        found[label] = torch.stack([*head_errors(own, head_outputs(model, TOKENS)).values()])
    assert found["none"].min() > 0 and found["eora"].mean() < found["none"].mean()


@pytest.mark.parametrize("kind", ["Mamba", "DiffLlama", "BitNet"])
def test_a_model_whose_heads_cannot_be_known_is_refused_by_name(kind):
    config = getattr(transformers, f"{kind}Config")(**COMMON | {"state_size": 8, "num_key_value_heads": 2})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with pytest.raises(EoraLabError, match=f"the heads of {kind}ForCausalLM are not known") as error:
        head_outputs(model, TOKENS)
    assert "\n" not in str(error.value)
    assert residual_stream(model, TOKENS).states  # for that one function alone
    assert read_lens(model, {"dense": residual_stream(model, TOKENS)})


# --- what is left behind, and what is refused ----------------------------------------------------------------------


def left_behind(model: nn.Module) -> list[str]:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    found = [name for name, one in model.named_modules() for kind in hooks if getattr(one, kind)]
    return [
        *found,
        *(name for name, one in model.named_modules() if "forward" in vars(one)),
        *_get_current_function_mode_stack(),
    ]


class Failing(nn.Module):
    """A module that runs some times more."""

    def __init__(self, module: nn.Module, times: int):
        super().__init__()
        self.module, self.left = module, times

    def forward(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise ValueError("out of order")
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("place", ["model.layers.1.mlp", "model.norm"])
def test_nothing_is_left_on_a_model_that_fails(place):
    model = tiny_model("llama")
    stream, sound = residual_stream(model, TOKENS), model.get_submodule(place)
    for call in (residual_stream, head_outputs, lambda one, _tokens: read_lens(one, {"dense": stream})):
        model.set_submodule(place, Failing(sound, 0))
        with pytest.raises(EoraLabError, match="does not run on these tokens alone: out of order"):
            call(model, TOKENS)
        assert left_behind(model) == []
    model.set_submodule(place, sound)
    model.model.norm = Failing(model.model.norm, 5)  # in the midst of reading
    with pytest.raises(ValueError, match="out of order"):
        read_lens(model, {"dense": stream})
    assert left_behind(model) == [] and model.model.norm.left == -1
    model.model.norm = model.model.norm.module
    assert stream_errors(stream, residual_stream(model, TOKENS)).count_nonzero() == 0


def test_what_does_not_belong_together_is_refused():
    model = tiny_model("llama")
    stream, heads = residual_stream(model, TOKENS), head_outputs(model, TOKENS)
    with pytest.raises(EoraLabError, match="two texts"):
        stream_errors(stream, residual_stream(model, TOKENS.flip(0)))
    with pytest.raises(EoraLabError, match="other blocks"):
        read_lens(model, {"dense": stream, "gpt2": residual_stream(model_of("gpt2"), TOKENS)})
    with pytest.raises(EoraLabError, match="two texts"):
        head_errors(heads, head_outputs(model, TOKENS[:5]))
    with pytest.raises(EoraLabError, match="no stream 'original'"):
        read_lens(model, {"dense": stream}, "original")
    with pytest.raises(EoraLabError, match="no row in the model's embedding"):
        residual_stream(model, [500])
    with pytest.raises(EoraLabError, match="the window must be token ids"):
        head_outputs(model, TOKENS[None])
