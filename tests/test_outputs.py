"""The backward pass, block by block, gives the gradients of the whole model, or the model is refused."""

import re

import pytest
import torch
from torch import nn

from eora_lab import EoraLabError, collect_output_statistics
from eora_lab.calibrate import backward, experts, stream
from eora_lab.calibrate.calls import BlockCalls
from eora_lab.calibrate.contract import check_blocks
from eora_lab.model.structure import block_linears
from tests.test_experts import mixture
from tests.test_stream import MODELS, SIZES, model_of
from tests.tiny import tiny_model, tiny_tokens

# heads that do more than multiply
HEADS = {
    "gemma2": ("Gemma2Config", SIZES | {"head_dim": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "granite": ("GraniteConfig", SIZES | {"logits_scaling": 7.0, "embedding_multiplier": 3.0}),
    "cohere": ("CohereConfig", SIZES | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", SIZES | {"logit_scale": 3.0}),
    "gpt2": ("GPT2Config", {
        "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2,
    }),
}  # fmt: skip
MODELS |= HEADS


def made(kind: str) -> nn.Module:
    return tiny_model(kind) if kind in ("llama", "qwen2", "gemma") else model_of(kind)


def drawn(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Labels by the same numbers, in float64."""
    sums = logits.double().softmax(-1).cumsum(-1)
    return (sums <= u.double()[..., None]).sum(-1)


def plain(model: nn.Module, tokens: torch.Tensor, labels: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Module name -> the gradients at its output by hooks and one backward pass a sample: (tokens, out)."""
    u = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(name):
        def watch(_module, _args, output):
            output.register_hook(lambda g: seen.setdefault(name, []).append(g.flatten(0, -2).double()))

        return watch

    handles = [linear.register_forward_hook(hook(name)) for name, linear in block_linears(model).items()]
    model.requires_grad_(True)
    for sample, own in zip(tokens.split(1), u.split(1), strict=True):
        logits = model(sample, use_cache=False).logits
        logits = logits[:, :-1] if labels == "text" else logits
        wanted = sample[:, 1:] if labels == "text" else drawn(logits.detach(), own)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.requires_grad_(False).zero_grad()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def assert_same(found, gradients, tolerance: float = 1e-5):
    assert found.keys() == gradients.keys()
    for name, g in gradients.items():
        exact = g.T @ g / len(g)
        assert found[name].tokens == len(g) and exact.any()
        assert (found[name].second_moment.double() - exact).norm() <= tolerance * exact.norm(), name


@pytest.mark.parametrize("labels", ["model", "text"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", *HEADS, "gemma3", "bamba"])
def test_statistics_are_those_of_a_backward_pass_of_the_whole_model(kind, labels, monkeypatch):
    monkeypatch.setattr(backward, "LOGITS", 97 * 4 * 5)  # logits of five places at once
    model, tokens = made(kind), tiny_tokens(5, 24)
    found = collect_output_statistics(model, tokens, labels=labels, progress=False)
    assert_same(found, plain(model, tokens, labels))


@pytest.mark.parametrize("size", [1, 97, 97 * 4 * 7, 2**24])
def test_how_many_logits_are_held_does_not_matter(size, monkeypatch):
    model, tokens = tiny_model("llama"), tiny_tokens(5, 24)
    monkeypatch.setattr(backward, "LOGITS", size)
    held = []
    leave = BlockCalls.leave
    monkeypatch.setattr(BlockCalls, "leave", lambda *args: held.append(leave(*args)) or held[-1])
    found = collect_output_statistics(model, tokens, seed=3, progress=False)
    assert max(one.numel() for one in held[2:]) <= max(size, 97 * 4)  # the first ones are those of the trial
    assert_same(found, plain(model, tokens, "model", seed=3))


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_blocks_run_once_where_what_their_gradients_need_fits_in_memory(blocks, monkeypatch):
    tokens, runs = tiny_tokens(4, 32), []
    whole = collect_output_statistics(tiny_model("llama"), tokens, progress=False)
    model, run = tiny_model("llama"), BlockCalls.run
    contract = check_blocks(model, tokens)
    with backward.frozen(model):
        one = backward.BackwardPass(model, contract, tokens)
        room = blocks * tokens.numel() * max(one._graphs.values())
        assert not blocks or room > tokens.numel() * (64 + 2 * 128) * 4  # at the least what the MLP's product needs
        monkeypatch.setattr(backward, "GRAPHS", room)
        monkeypatch.setattr(BlockCalls, "run", lambda *args: runs.append(args[2]) or run(*args))
        assert len(list(one.gradients(tokens, backward.towards(tokens)))) == 2
    assert len(runs) == 4 - blocks
    found = collect_output_statistics(model, tokens, progress=False)
    for name, statistics in whole.items():
        F = statistics.second_moment
        assert (found[name].second_moment - F).norm() <= 1e-5 * F.norm()  # fewer sequences go together


def test_an_expert_is_measured_by_its_own_tokens_and_drawn_towards_those_of_its_mixture():
    model, tokens = mixture(), tiny_tokens(6)
    found = collect_output_statistics(model, tokens, labels="text", progress=False)
    gradients = plain(model, tokens, "text")
    for leaf in ("gate_up_proj", "down_proj"):
        names = [f"model.layers.1.mlp.experts.{index}.{leaf}" for index in range(4)]
        layer = sum(gradients[name].T @ gradients[name] for name in names)
        total = sum(len(gradients[name]) for name in names)
        assert total == 2 * tokens.numel()
        for name in names:
            one, g = found[name], gradients[name]
            assert one.tokens == len(g)
            k = one.pooled_tokens
            assert k == one.out_features
            torch.testing.assert_close(
                one.second_moment.double(), (g.T @ g + k * layer / total) / (len(g) + k), rtol=1e-4, atol=1e-7
            )


def test_experts_share_one_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(experts, "BOUND", 4 * 64 * 64 * 16 - 1)  # 16 linears of experts, two blocks
    model, tokens = mixture(), tiny_tokens(3)
    found = collect_output_statistics(model, tokens, progress=False, only="experts")
    names = [f"model.layers.0.mlp.experts.{index}.down_proj" for index in range(4)]
    assert len({id(found[name]) for name in names}) == 1 and found[names[0]].tokens == 2 * tokens.numel()


def test_held_out_samples_are_measured_apart_and_the_model_is_as_before():
    model, tokens = tiny_model("llama"), tiny_tokens(8, 16)
    model.requires_grad_(True)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    needed = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = collect_output_statistics(model, tokens, held_out=0.25, labels="text", progress=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    kept, apart = plain(model, tokens[:6], "text"), plain(model, tokens[6:], "text")
    assert_same(found, kept)
    assert_same({name: one.held_out for name, one in found.items()}, apart)


def test_only_some_layers_are_measured():
    model, tokens = tiny_model("llama"), tiny_tokens(2, 16)
    found = collect_output_statistics(model, tokens, only=r"1\.mlp\.down", progress=False)
    every = collect_output_statistics(model, tokens, progress=False)
    assert list(found) == ["model.layers.1.mlp.down_proj"]
    assert torch.equal(
        found["model.layers.1.mlp.down_proj"].second_moment, every["model.layers.1.mlp.down_proj"].second_moment
    )


def test_drawn_labels_give_the_fisher_information(monkeypatch):
    """Of the last layer before the norm it is known: the mean of Jᵀ (diag p - p pᵀ) J."""
    model, tokens = tiny_model("llama"), tiny_tokens(1, 12)
    name, block = "model.layers.1.mlp.down_proj", model.model.layers[1]
    seen = []
    handle = block.register_forward_hook(lambda _m, _a, output: seen.append(output.detach()))
    model(tokens)
    handle.remove()
    exact = torch.zeros(64, 64)
    for h in seen[0][0]:
        J = torch.autograd.functional.jacobian(lambda one: model.lm_head(model.model.norm(one)), h)
        p = model.lm_head(model.model.norm(h)).softmax(-1).detach()
        exact += J.T @ (p.diag() - p.outer(p)) @ J / tokens.shape[1]
    for module in (backward, stream):
        monkeypatch.setattr(module, "BATCH", 500)
    found = collect_output_statistics(model, tokens.expand(2000, -1), only=name, progress=False)[name].second_moment
    assert (found - exact).norm() <= 0.1 * exact.norm()  # 24 000 draws


@pytest.mark.parametrize("kind", ["gemma4", "gemma3n"])
def test_blocks_that_hand_on_keys_and_values_are_refused(kind):
    with pytest.raises(EoraLabError, match=r"layers\.\d+: gradients by this block alone are not those of the model"):
        collect_output_statistics(model_of(kind), tiny_tokens(2, 24), progress=False)


def test_a_head_that_looks_at_more_than_hidden_states_is_refused():
    with pytest.raises(EoraLabError, match="CpmAntForCausalLM makes no logits of hidden states by themselves"):
        collect_output_statistics(model_of("cpmant"), tiny_tokens(2, 24), progress=False)


def test_gradients_that_are_not_finite_name_the_layer():
    model = tiny_model("llama")
    down = model.model.layers[1].mlp.down_proj
    down.register_full_backward_hook(lambda _module, grads, _out: (grads[0] * torch.inf,))
    with pytest.raises(EoraLabError, match=r"model\.layers\.\d\.\S+: NaN or Inf in its output gradient"):
        outputs_without_trial(model, tiny_tokens(2, 16))


def outputs_without_trial(model, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward.BackwardPass, "_check", lambda self, tokens: setattr(self, "_vocabulary", 97))
        return collect_output_statistics(model, tokens, progress=False)


def test_bfloat16():
    model, tokens = tiny_model("llama"), tiny_tokens(4, 24)
    exact = plain(model, tokens, "text")
    found = collect_output_statistics(model.bfloat16(), tokens, labels="text", progress=False)
    assert_same(found, exact, tolerance=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "true"}, "unknown labels 'true'; known: model, text"),
        ({"only": "vision"}, "no layer matches 'vision'; names are like model.layers.0"),
        ({"held_out": 0.1}, "holding out 0.1 of 2 samples leaves none on one side"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(EoraLabError, match=re.escape(message)):
        collect_output_statistics(tiny_model("llama"), tiny_tokens(2, 16), progress=False, **settings)


def test_a_loss_needs_two_tokens():
    with pytest.raises(EoraLabError, match="a loss needs sequences of two tokens or more, not 1"):
        collect_output_statistics(tiny_model("llama"), tiny_tokens(2, 1), progress=False)
