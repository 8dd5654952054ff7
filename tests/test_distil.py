"""A step of distillation: gradients of autograd, never a loss on held-out tokens, kept whole in a run folder."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from eora_lab import EoraLabError, Recipe, load_model, load_run
from eora_lab.calibrate import backward, distillation
from eora_lab.calibrate.contract import check_blocks
from eora_lab.calibrate.distillation import Targets
from eora_lab.calibrate.outputs import collect_output_statistics
from eora_lab.calibrate.stream import collect_statistics
from eora_lab.compensate.distillation import DistillationStep
from eora_lab.files import read_tensors
from eora_lab.layer.linear import CompensatedLinear, compensated
from eora_lab.run import distil as distil_module
from eora_lab.run.distil import held_out_divergence
from eora_lab.run.distilled import DISTILLED, load_distilled
from eora_lab.run.folder import read_report
from eora_lab.run.stored import run_factors
from tests.tiny import SMALL, compress, logits, save_tiny, tiny_model, tiny_tokens

HELD = {**SMALL, "bits": 2, "held_out": 0.25}
DISTIL = {**HELD, "distil": True}


def pair(kind: str = "llama", tokens: torch.Tensor | None = None, scale: float = 1, **settings):
    """The original, the compressed model, and the targets of the original.

    scale: of the last norm. With 6, models are nearly as sure as trained ones: else predictions hardly differ.
    """
    tokens = tiny_tokens(8) if tokens is None else tokens
    original, model = tiny_model(kind), tiny_model(kind)
    for one in (original, model):
        one.model.norm.weight.data += scale - 1  # gemma's scale is 1 + weight
    targets = Targets(original, tokens, 0.25, check_blocks(original, tokens))
    compress(model, tokens, **HELD | settings)
    return original, model, targets


def far(original, model, tokens) -> float:
    """KL(original ‖ model), nats a token, plain and in float64."""
    p, q = (logits(one, tokens).double().log_softmax(-1) for one in (original, model))
    return kl_div(q, p, reduction="sum", log_target=True).item() / tokens.numel()


def factors(model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (one.lora_A.clone(), one.lora_B.clone()) for name, one in compensated(model).items()}


def with_plain_linears(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with the same weights, in linears of torch."""
    model = copy.deepcopy(model)
    for name, one in compensated(model).items():
        plain = nn.Linear(one.in_features, one.out_features, one.bias is not None)
        plain.weight = nn.Parameter(one.dense().to(dtype) + one.lora_B.to(dtype) @ one.lora_A.to(dtype))
        plain.bias = one.bias
        model.set_submodule(name, plain)
    return model.to(dtype).requires_grad_(False)


def by_autograd(original: nn.Module, model: nn.Module, tokens: torch.Tensor, names) -> dict[str, tuple]:
    """Name of a linear -> E[g xᵀ] and E[x xᵀ] by one backward pass of the whole model, added up in float64."""
    seen = {}

    def hook(name):
        def watch(_module, args, output):
            output.retain_grad()
            seen[name] = args[0], output

        return watch

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    p = logits(original, tokens).log_softmax(-1)
    model.model.embed_tokens.weight.requires_grad_(True)
    q = model(tokens, use_cache=False).logits.log_softmax(-1)
    kl_div(q, p, reduction="sum", log_target=True).backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, (x, y) in seen.items():
        x, g = (one.flatten(0, 1).double() for one in (x.detach(), y.grad))
        found[name] = g.T @ x / tokens.numel(), x.T @ x / tokens.numel()
    return found


@pytest.mark.parametrize("size", [97, 97 * 4 * 5, 2**24])  # one place at a time, five, all
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_gradients_are_as_near_to_those_of_float64_as_those_of_autograd(kind, size, monkeypatch):
    for module in (backward, distillation):
        monkeypatch.setattr(module, "LOGITS", size)
    tokens = tiny_tokens(8)
    original, model, targets = pair(kind, tokens, scale=6)
    names = list(compensated(model))
    pulls, found = targets.pulls(model, names)
    fitted = tokens[:6]
    assert found == pytest.approx(far(original, model, fitted), rel=1e-3)  # float32 logits
    exact = by_autograd(copy.deepcopy(original).double(), with_plain_linears(model, torch.float64), fitted, names)
    plain = by_autograd(original, model, fitted, names)
    assert exact.keys() == plain.keys() == pulls.keys()
    for name, pull in pulls.items():
        for ours, other, wanted in zip(
            (pull.gradient, pull.inputs.second_moment), plain[name], exact[name], strict=True
        ):
            # gemma predicts the token that it reads: its gradients cancel, and float32 is ten times as far from float64
            allowed = 2 * (other - wanted).norm() + 1e-6 * wanted.norm()
            assert wanted.any() and (ours - wanted).norm() <= allowed <= 1e-4 * wanted.norm(), name


def test_the_metric_is_that_of_the_model_as_it_is():
    """Of a model whose compression changed nothing that matters here: the statistics are those of plain passes."""
    tokens = tiny_tokens(8)
    _, model, targets = pair(tokens=tokens)
    pulls, _ = targets.pulls(model, compensated(model))
    model = with_plain_linears(model, torch.float32)
    # labels are drawn by the same numbers, of which those of samples that are held out come last
    inputs = collect_statistics(model, tokens, 0.25, progress=False)
    outputs = collect_output_statistics(model, tokens, 0.25, progress=False)
    for name, pull in pulls.items():
        torch.testing.assert_close(pull.inputs.second_moment, inputs[name].second_moment, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(pull.outputs.second_moment, outputs[name].second_moment, rtol=1e-2, atol=1e-4)
        assert pull.inputs.tokens == pull.outputs.tokens == 6 * 32


def test_a_step_is_newtons_as_far_as_the_path_can_take_it():
    _, model, targets = pair(rank=16)
    pulls = targets.pulls(model, compensated(model))[0]
    pull, layer = pulls["model.layers.0.mlp.down_proj"], compensated(model)["model.layers.0.mlp.down_proj"]
    A, B = layer.factors.dense()
    L, S = pull.outputs.root(), pull.inputs.second_moment.double()
    T = torch.linalg.cholesky(S + 0.1 * S.diagonal().mean() * torch.eye(len(S)))
    newton = -torch.linalg.inv(L @ L.T) @ pull.gradient.double() @ torch.linalg.inv(T @ T.T)
    M = L.T @ newton @ T
    U, _, Vh = torch.linalg.svd(L.T @ (B @ A).double() @ T)
    U, Vh = U[:, :16], Vh[:16]
    wanted = M - (torch.eye(64) - U @ U.T) @ M @ (torch.eye(128) - Vh.T @ Vh)
    step = DistillationStep(pull, A, B, 1e9)  # as if it cost nothing to move
    assert step.length == pytest.approx(wanted.square().sum().item() / 2, rel=1e-6)

    def moved(share: float) -> torch.Tensor:
        path = step.taken(share)
        assert path.A.shape == A.shape and path.B.shape == B.shape
        return L.T @ (path.B.double() @ path.A.double() - (B @ A).double()) @ T

    assert moved(0.0).norm() <= 1e-5 * (L.T @ (B @ A).double() @ T).norm()
    small = 1e-3 * (L.T @ (B @ A).double() @ T).norm() / wanted.norm()  # to first order; float32 factors
    assert (moved(float(small)) / small - wanted).norm() <= 0.02 * wanted.norm()


def test_a_path_of_full_rank_takes_all_of_newtons_step_and_no_more_than_the_bound():
    _, model, targets = pair(rank=64)
    name = "model.layers.1.self_attn.o_proj"
    pull, (A, B) = targets.pulls(model, [name])[0][name], compensated(model)[name].factors.dense()
    F = pull.outputs.root() @ pull.outputs.root().T
    S = pull.inputs.second_moment.double()
    S += 0.1 * S.diagonal().mean() * torch.eye(len(S))
    free = DistillationStep(pull, A, B, 1e9)
    taken = free.taken(1.0)
    whole = taken.B.double() @ taken.A.double() - (B @ A).double()
    G = pull.gradient.double()
    assert (F @ whole @ S + G).norm() <= 1e-3 * G.norm()  # float32 factors
    step = DistillationStep(pull, A, B, free.length / 4)
    assert step.length == pytest.approx(free.length / 4, rel=1e-9)
    bounded = step.taken(1.0)
    change = bounded.B.double() @ bounded.A.double() - (B @ A).double()
    assert ((F @ change @ S) * change).sum().item() / 2 == pytest.approx(free.length / 4, rel=0.05)
    assert (G * change).sum() < 0  # downhill


@pytest.mark.parametrize("settings", [{}, {"factor_bits": 4}, {"method": "eora_fisher"}, {"inputs": "drift"}])
def test_the_divergence_on_held_out_tokens_falls(settings):
    tokens = tiny_tokens(48)
    original, model, _ = pair(tokens=tokens, **settings)
    distilled = tiny_model("llama")
    report = compress(distilled, tokens, **DISTIL, **settings)
    found = report.distilled
    assert found["before"] == pytest.approx(far(original, model, tokens[36:]), rel=1e-3)
    assert found["after"] == pytest.approx(far(original, distilled, tokens[36:]), rel=1e-3)
    assert found["after"] < found["before"] and 0 < found["share"] <= 1
    assert all(
        torch.equal(one.dense(), other.dense())  # codes stay
        for one, other in zip(compensated(model).values(), compensated(distilled).values(), strict=True)
    )
    assert report.nbytes == sum(one.nbytes for one in compensated(model).values())
    assert "nats a held-out token" in report.summary()


def test_where_no_share_of_the_step_helps_nothing_changes(monkeypatch):
    taken = DistillationStep.taken
    monkeypatch.setattr(DistillationStep, "taken", lambda step, share: taken(step, -share))  # uphill
    _, plain, _ = pair()
    model = tiny_model("llama")
    found = compress(model, tiny_tokens(8), **DISTIL).distilled
    assert found["share"] == 0 and found["before"] == found["after"]
    for one, other in zip(factors(plain).values(), factors(model).values(), strict=True):
        assert all(map(torch.equal, one, other))


def test_layers_are_measured_in_as_many_sweeps_as_memory_asks_for(monkeypatch):
    whole = tiny_model("llama")
    compress(whole, tiny_tokens(16), **DISTIL)
    monkeypatch.setattr(distil_module, "SUMS", 1)  # a block at a time
    model = tiny_model("llama")
    compress(model, tiny_tokens(16), **DISTIL)
    for one, other in zip(factors(whole).values(), factors(model).values(), strict=True):
        assert all(map(torch.equal, one, other))


def test_an_interrupted_run_resumes_before_the_step_or_after_it(tmp_path):
    name, tokens = save_tiny(tmp_path / "model"), tiny_tokens(16)
    run = tmp_path / "run"
    whole = load_model(name)[0]
    report = compress(whole, tokens, **DISTIL, folder=run)
    assert report.distilled["share"] > 0
    blocks = {file: read_tensors(file) for file in sorted((run / "blocks").iterdir())}
    kept = {key: one.clone() for key, one in load_distilled(run / DISTILLED)[1].items()}
    for lost in ([DISTILLED], ["blocks/001.safetensors"], []):
        for one in (*lost, "report.json"):
            (run / one).unlink()
        again = load_model(name)[0]
        found = compress(again, tokens, **DISTIL, folder=run)
        assert torch.equal(logits(again, tokens[:2]), logits(whole, tokens[:2]))
        assert found.distilled["share"] == report.distilled["share"]
        for one, held in (blocks | {run / DISTILLED: kept}).items():
            assert all(torch.equal(tensor, held[key]) for key, tensor in read_tensors(one).items())


def test_a_run_gives_its_distilled_paths_to_all_who_read_it(tmp_path):
    name, run = save_tiny(tmp_path / "model"), tmp_path / "run"
    model = load_model(name)[0]
    compress(model, tiny_tokens(16), **DISTIL, folder=run)
    loaded = load_run(run)[0]
    assert torch.equal(logits(loaded, tiny_tokens(2)), logits(model, tiny_tokens(2)))
    for layer, (A, B) in run_factors(run).items():
        one = compensated(model)[layer]
        assert torch.equal(A, one.lora_A) and torch.equal(B, one.lora_B)
    assert read_report(run).distilled["after"] < read_report(run).distilled["before"]
    whole = (run / DISTILLED).read_bytes()
    (run / DISTILLED).unlink()
    (run / DISTILLED).write_bytes(whole[:-1] + b"\x55")
    damaged = r"distilled.safetensors is damaged \(its checksum does not agree\): "
    with pytest.raises(EoraLabError, match=f"{damaged}start the run again"):
        load_run(run)
    with pytest.warns(UserWarning, match=f"{damaged}it was moved to .*aside, and is made again"):
        compress(load_model(name)[0], tiny_tokens(16), **DISTIL, folder=run)
    again = load_run(run)[0]
    assert torch.equal(logits(again, tiny_tokens(2)), logits(loaded, tiny_tokens(2)))


def test_the_judge_walks_the_model_as_it_is():
    tokens = tiny_tokens(8)
    original, model, targets = pair(tokens=tokens)
    assert held_out_divergence(model, targets) == pytest.approx(far(original, model, tokens[6:]), rel=1e-3)
    assert held_out_divergence(original, targets) == pytest.approx(0, abs=1e-7)
    assert all(isinstance(one, CompensatedLinear) for one in compensated(model).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "none", "held_out": 0.25}, "only a low-rank path can be distilled"),
        ({"rank": 0, "held_out": 0.25}, "only a low-rank path can be distilled"),
        ({}, "how far to distil is found on held-out samples: hold out a share, such as 0.125"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(EoraLabError, match=message):
        Recipe(distil=True, **settings)


def test_a_step_needs_texts():
    model = tiny_model("llama")
    statistics = collect_statistics(model, tiny_tokens(8), 0.25, progress=False)
    with pytest.raises(EoraLabError, match="a step of distillation needs token ids"):
        compress(model, None, **DISTIL, inputs="original", statistics=statistics)
