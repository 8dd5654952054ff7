"""One A for layers that share an input: the optimum of the stacked problem, from the solver to the run folder."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from eora_lab import (
    Adapters,
    EoraLabError,
    InputStatistics,
    OutputStatistics,
    Recipe,
    collect_output_statistics,
    collect_statistics,
    load_model,
    load_run,
    output_energy,
    plan_ranks,
    solve_shared,
)
from eora_lab.calibrate.contract import check_blocks
from eora_lab.compensate import SOLVERS, needs_outputs, solve
from eora_lab.compensate.factors import StoredFactors, with_shared
from eora_lab.experiment import sweep
from eora_lab.experiment.store import ResultStore
from eora_lab.model.structure import block_linears
from eora_lab.run.budget import Budget
from eora_lab.run.groups import sharing
from eora_lab.run.ranks import layer_spectra
from eora_lab.run.stored import run_factors
from tests.tiny import CELL, SMALL, compress, logits, moe_model, save_tiny, tiny_model, tiny_tokens

SHARED = SMALL | {"shared_factors": True, "inputs": "original"}
ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
SIZES = (12, 5, 9)


def problem(seed: int, decades: int, tokens: int = 40):
    """Residuals of three layers, statistics of an input that they share, and of gradients at their outputs."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn
    x = random(tokens, 16, generator=generator) @ random(16, 16, generator=generator) * torch.logspace(0, -decades, 16)
    x[:, seed % 16] = 0  # a channel that is always zero
    statistics = InputStatistics(16)
    statistics.update(x)
    residuals = [random(size, 16, generator=generator) * 10.0 ** (i - 1) for i, size in enumerate(SIZES)]
    outputs = []
    for i, size in enumerate(SIZES):
        g = random(30, size, generator=generator) * torch.logspace(-i, -i - decades, size)
        outputs.append(OutputStatistics.from_second_moment(g.T @ g / 30))
    return residuals, statistics, outputs


def damped(one: OutputStatistics) -> torch.Tensor:
    F = one.second_moment.double()
    return F + one.damping * F.diagonal().mean() * torch.eye(len(F), dtype=F.dtype)


@given(seed=st.integers(0, 999), decades=st.integers(0, 5), rank=st.integers(1, 16), fisher=st.booleans())
@settings(deadline=None, max_examples=40)
def test_no_other_shared_factor_leaves_less_of_the_sum(seed, decades, rank, fisher):
    """Against Eckart and Young in float64, with roots of F and S of another kind; and predicted = measured."""
    residuals, statistics, outputs = problem(seed, decades)
    signals = [output_energy(10 * one, statistics.second_moment) for one in residuals]
    given_ = {"outputs": outputs} if fisher else {"signals": signals}
    method = "eora_fisher" if fisher else "eora"
    metrics = [
        damped(F) if fisher else torch.eye(len(R)).double() / s
        for F, R, s in zip(outputs, residuals, signals, strict=True)
    ]
    S = statistics.second_moment.double()

    def left(answers):
        errors = [R.double() - one.dense().double() for R, one in zip(residuals, answers, strict=True)]
        return sum((F @ D @ S @ D.T).trace().item() for F, D in zip(metrics, errors, strict=True))

    answers = solve_shared(method, residuals, statistics, rank, **given_)
    assert all(torch.equal(one.A, answers[0].A) for one in answers)
    roots = [torch.linalg.eigh(F) for F in metrics]
    halves = [(vectors * values.clamp_min(0).sqrt()) @ vectors.T for values, vectors in roots]
    values, vectors = torch.linalg.eigh(S)
    T = vectors * values.clamp_min(0).sqrt()
    stack = torch.cat([half @ R.double() @ T for half, R in zip(halves, residuals, strict=True)])
    energies = torch.linalg.svdvals(stack).square()
    whole, slack = energies.sum().item(), 1e-5 * energies.sum().item()  # residuals and answers are float32
    assert left(answers) == pytest.approx(energies[rank:].sum().item(), abs=slack)
    assert answers[0].spectrum.sum().item() == pytest.approx(whole, rel=1e-4)
    assert answers[0].spectrum[rank:].sum().item() == pytest.approx(left(answers), abs=slack)

    def alone(ranks):
        given_alone = outputs if fisher else [None] * 3
        return left([solve(method, R, statistics, r, F) for R, r, F in zip(residuals, ranks, given_alone, strict=True)])

    assert alone([min(rank, size) for size in SIZES]) <= left(answers) + slack
    assert left(answers) <= alone([rank // 3, rank // 3, rank - 2 * (rank // 3)][i] for i in range(3)) + slack


@pytest.mark.parametrize("method", [name for name in SOLVERS if name != "none"])
def test_every_method_takes_it(method):
    residuals, statistics, outputs = problem(1, 2)
    answers = solve_shared(method, residuals, statistics, 4, outputs=outputs if needs_outputs(method) else None)
    assert [one.B.shape for one in answers] == [(size, 4) for size in SIZES] and answers[0].A.shape == (4, 16)
    assert all(one.A is answers[0].A for one in answers)
    one = solve_shared(method, residuals[:1], statistics, 4, outputs=outputs[:1] if needs_outputs(method) else None)[0]
    wanted = solve(method, residuals[0], statistics, 4, outputs[0]).dense()  # one layer alone shares with nobody
    torch.testing.assert_close(one.dense(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_a_layer_without_gradients_leaves_the_factor_to_the_others():
    residuals, statistics, outputs = problem(2, 1)
    silent = [*outputs[:2], OutputStatistics.from_second_moment(torch.zeros(SIZES[2], SIZES[2]))]
    answers = solve_shared("eora_fisher", residuals, statistics, 6, outputs=silent)
    wanted = solve_shared("eora_fisher", residuals[:2], statistics, 6, outputs=outputs[:2])
    for one, other, R in zip(answers, wanted, residuals[:2], strict=False):
        torch.testing.assert_close(one.dense(), other.dense(), rtol=0, atol=0.02 * R.abs().max().item())
    left = residuals[2] - answers[2].dense()  # and gets what that allows
    assert output_energy(left, statistics.second_moment) < output_energy(residuals[2], statistics.second_moment)
    with pytest.raises(EoraLabError, match="3 layers share an input, and 2 signals or outputs are given"):
        solve_shared("eora_fisher", residuals, statistics, 6, outputs=outputs[:2])


@pytest.mark.parametrize("method", ["eora", "eora_fisher"])
@pytest.mark.parametrize("factor_bits", [16, 4])
def test_a_pass_stores_and_counts_it_once(method, factor_bits, tmp_path):
    name = save_tiny(tmp_path / "model")
    model, tokens = load_model(name)[0], tiny_tokens()
    given_ = SHARED | {"method": method, "factor_bits": factor_bits}
    report = compress(model, tokens, **given_, folder=tmp_path / "run")
    layers = {one.name: one for one in report.layers}
    users = {one.name: one.A_of for one in report.layers if one.A_of}
    gate, up = (f"model.layers.1.mlp.{one}_proj" for one in ("gate", "up"))
    assert len(users) == 6 and users[ATTENTION[1]] == users[ATTENTION[2]] == ATTENTION[0] and users[up] == gate
    for one, first in users.items():
        assert torch.equal(model.get_submodule(one).lora_A, model.get_submodule(first).lora_A)
    bits = 16 if factor_bits == 16 else factor_bits
    saved = SMALL["rank"] * 64 * bits // 8 + (0 if factor_bits == 16 else 3 * SMALL["rank"])
    apart = compress(load_model(name)[0], tokens, **given_ | {"shared_factors": False})
    assert apart.nbytes - report.nbytes == 6 * saved
    assert "6 of 14 layers use A of another one that reads the same input" in report.summary()
    held = load_file(tmp_path / "run" / "blocks" / "000.safetensors")
    assert not any(key.startswith(f"{ATTENTION[1]}.lora_A") and not key.endswith(".of") for key in held)
    again = load_run(tmp_path / "run")[0]
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert torch.equal(run_factors(tmp_path / "run")[up][0], run_factors(tmp_path / "run")[gate][0])
    assert Adapters(again).nbytes == Adapters(model).nbytes and again.get_submodule(up).factors.A_of == gate
    (tmp_path / "run" / "report.json").unlink()
    (tmp_path / "run" / "blocks" / "001.safetensors").unlink()
    resumed = compress(load_model(name)[0], tokens, **given_, folder=tmp_path / "run")
    assert [one.error_after for one in resumed.layers] == [one.error_after for one in report.layers]
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    repeated = [adapter[f"base_model.model.{one}.lora_A.weight"] for one in ATTENTION]
    assert torch.equal(repeated[0], repeated[1]) and torch.equal(repeated[0], repeated[2])
    assert "the same for layers that read one input, and repeated here" in (
        tmp_path / "run" / "adapter" / "README.md"
    ).read_text(encoding="utf-8")
    assert layers[ATTENTION[0]].spectrum == layers[ATTENTION[1]].spectrum  # of both together


def test_what_a_pass_leaves_is_what_the_spectra_predict():
    model, tokens = tiny_model("llama"), tiny_tokens()
    statistics, contract = collect_statistics(model, tokens, progress=False), check_blocks(model, tokens)
    recipe = Recipe("rtn", bits=3, group_size=32, shared_factors=True)
    groups = sharing(block_linears(model), contract, True)
    assert sorted(map(len, groups)) == [1, 1, 1, 1, 2, 2, 3, 3]
    spectra = layer_spectra(model, statistics, recipe, progress=False, groups=groups)
    report = compress(model, tokens, **SHARED)
    after = {one.name: one.error_after for one in report.layers}
    for names in groups:
        predicted = spectra[names[0]].spectrum[8:].sum().item() / spectra[names[0]].signal
        assert sum(after[name] for name in names) == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize("objective", ["relative", "nats"])
def test_a_budget_spends_on_rank_what_sharing_saves(objective):
    model, tokens, budget = tiny_model("llama"), tiny_tokens(), Budget(objective, multiple=1)
    method = "eora_fisher" if objective == "nats" else "eora"
    outputs = collect_output_statistics(model, tokens, progress=False) if objective == "nats" else None
    recipe = Recipe("rtn", bits=3, group_size=32, rank=8, method=method, inputs="original", shared_factors=True)
    statistics = collect_statistics(model, tokens, progress=False)
    ranks = plan_ranks(model, statistics, recipe, budget, progress=False, outputs=outputs)
    groups = sharing(block_linears(model), check_blocks(model, tokens), True)
    shapes = {name: linear.weight.shape for name, linear in block_linears(model).items()}
    allowed, spent = 8 * sum(sum(shape) for shape in shapes.values()), 0
    for names in groups:
        (rank,) = {ranks[name] for name in names}
        spent += rank * (shapes[names[0]][1] + sum(shapes[name][0] for name in names))
        assert rank <= min(min(shapes[name]) for name in names)
    assert allowed - max(map(sum, shapes.values())) * 3 < spent <= allowed
    report = compress(model, tokens, **SHARED | {"method": method}, ranks=budget)
    assert len({one.rank for one in report.layers}) > 1
    stored = sum(one.rank * (one.out_features + (0 if one.A_of else one.in_features)) for one in report.layers)
    assert stored <= allowed


def test_all_parts_together_and_experts():
    given_ = SHARED | {"inputs": "drift", "held_out": 0.25, "true_sequential": True, "rounds": 2, "bits": 2, "rank": 4}
    given_ |= {"method": "eora_fisher", "factor_bits": 4}
    for model, shrink in ((tiny_model("llama"), True), (moe_model(), False)):
        report = compress(model, tiny_tokens(16), **given_, shrink=shrink, ranks=Budget("nats"))
        assert any(one.A_of for one in report.layers)
        assert sum(one.nats_after for one in report.layers) < sum(one.nats_before for one in report.layers)
        for one in report.layers:
            if one.A_of:
                assert torch.equal(model.get_submodule(one.name).lora_A, model.get_submodule(one.A_of).lora_A)


def test_rounds_are_judged_by_the_stacked_loss():
    model, tokens = tiny_model("llama"), tiny_tokens()
    once, more = (compress(tiny_model("llama"), tokens, **SHARED | {"bits": 2}, rounds=rounds) for rounds in (1, 3))
    for names in sharing(block_linears(model), check_blocks(model, tokens), True):
        sums = [sum(one.error_after for one in report.layers if one.name in names) for report in (once, more)]
        assert sums[1] <= sums[0] * (1 + 1e-4)


def test_cells_of_a_sweep_share_their_solves(workplace):
    grid = CELL | {"bits": 3, "method": "eora", "rank": [4, 8], "shared_factors": [False, True]}
    frame = sweep(grid, ResultStore("store"), announce=lambda _: None).set_index(["rank", "shared_factors"])
    assert (frame["status"] == "done").all()
    assert frame.loc[(8, True), "nbytes"] < frame.loc[(8, False), "nbytes"]
    model = load_model("model")[0]
    report = compress(model, tiny_tokens(), **SHARED)
    assert frame.loc[(8, True), "nbytes"] == report.nbytes
    solves = {path.name for path in (ResultStore("store").folder / "cache" / "solves").rglob("*.safetensors")}
    assert len(solves) == 14 + 4  # answers of single layers are the same, and those of two groups a block are not


def test_what_cannot_be_done_is_refused(tmp_path):
    model, tokens = tiny_model("llama"), tiny_tokens()
    ranks = dict.fromkeys(block_linears(model), 8) | {ATTENTION[1]: 4}
    with pytest.raises(EoraLabError, match=r"q_proj and .*k_proj share A, and are given ranks 8 and 4"):
        compress(model, tokens, **SHARED, ranks=ranks)
    report = compress(model, tokens, **SHARED, ranks=ranks | {ATTENTION[1]: 0})  # no path at all is no other rank
    assert [one.A_of for one in report.layers if one.name in ATTENTION] == ["", "", ATTENTION[0]]
    model = tiny_model("llama")
    with pytest.raises(EoraLabError, match="which layers share an input is seen on token ids"):
        compress(model, None, **SHARED, statistics=collect_statistics(model, tokens, progress=False))
    with pytest.raises(EoraLabError, match="share A count by relative errors"):
        compress(model, tokens, **SHARED, ranks=Budget("absolute"))
    with pytest.raises(EoraLabError, match="leave distil or shared_factors out"):
        Recipe(shared_factors=True, distil=True, held_out=0.25)
    state = StoredFactors(torch.ones(2, 4), torch.ones(3, 2), "a").state_dict()
    with pytest.raises(KeyError, match="lora_A"):
        with_shared({f"b.{key}": one for key, one in state.items()})


def test_an_older_run_resumes(tmp_path):
    name = save_tiny(tmp_path / "model")
    compress(load_model(name)[0], tiny_tokens(), **SMALL, folder=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["settings"]["shared_factors"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    compress(load_model(name)[0], tiny_tokens(), **SMALL, folder=tmp_path / "run")
