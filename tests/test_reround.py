"""Rounding again onto a grid that is there: never worse in any row, and the optimum of every single column."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eora_lab import Recipe, compress_model, load_model, load_run
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.cli import main
from eora_lab.compress import CodebookWeight, GridWeight, gptq, magnitude, reround, rtn, sparsegpt
from eora_lab.errors import EoraLabError
from eora_lab.formats import GptqCheckpoint, write_checkpoint
from eora_lab.layer.linear import compensated
from tests.tiny import compress, save_tiny, tiny_tokens


def layer(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, InputStatistics]:
    """A weight, and statistics of correlated inputs with channels of unlike size."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random) / columns**0.5 + torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=random) @ mix * torch.rand(columns, generator=random).exp()
    statistics = InputStatistics(columns)
    statistics.update(x)
    return torch.randn(rows, columns, generator=random), statistics


def losses(error: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    error, S = error.double(), statistics.second_moment.double()
    return ((error @ S) * error).sum(1)


BASES = {
    "rtn": lambda w, s: rtn(w, s, bits=3, group_size=16),
    "rtn sym": lambda w, s: rtn(w, s, bits=3, group_size=16, sym=True),
    "rtn integer": lambda w, s: rtn(w, s, bits=2, group_size=20, zero_point="integer", scale_dtype="float16"),
    "gptq": lambda w, s: gptq(w, s, bits=3, group_size=16),
    "pruned": lambda w, s: magnitude(w, s, sparsity="2:4", bits=3, group_size=16),
    "sparsegpt": lambda w, s: sparsegpt(w, s, sparsity="0.5", bits=4, group_size=16),
}


@pytest.mark.parametrize("base", BASES)
@settings(max_examples=25)
@given(st.integers(1, 6), st.sampled_from([16, 40, 72]), st.integers(0, 2**32 - 1))
def test_no_row_gets_worse_and_the_grid_stays(base, rows, columns, seed):
    weight, statistics = layer(rows, columns, seed)
    before = BASES[base](weight, statistics)
    after = reround(weight, statistics, before)
    assert isinstance(before, GridWeight) and isinstance(after, GridWeight)
    lost, was = losses(weight - after.dense(), statistics), losses(weight - before.dense(), statistics)
    assert (lost <= was * (1 + 1e-4) + 1e-6 * was.max()).all()
    assert torch.equal(after.scales, before.scales) and torch.equal(after.offsets, before.offsets)
    assert after.codes.max() < 2**before.bits
    if before.mask is not None:
        assert torch.equal(after.mask, before.mask) and not after.dense()[~before.mask].any()


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_no_code_alone_could_be_better(seed):
    weight, statistics = layer(3, 24, seed)
    after = reround(weight, statistics, rtn(weight, statistics, bits=3, group_size=8))
    least = losses(weight - after.dense(), statistics)
    better = 0
    for column in range(24):
        for step in (-1, 1):
            codes = after.codes.int()
            codes[:, column] = (codes[:, column] + step).clamp(0, 7)
            other = losses(weight - after.with_codes(codes.to(torch.uint8)).dense(), statistics)
            better += int((other < least * (1 - 1e-4)).sum())
    assert better <= 1  # a last sweep that changes next to nothing is not followed by another


def test_it_mends_what_rounding_to_nearest_broke_and_more_than_gptq():
    weight, statistics = layer(64, 64, 0)
    grid = {"bits": 3, "group_size": 16}
    base = rtn(weight, statistics, **grid)
    by_gptq = gptq(weight, statistics, **grid)
    lost = [
        losses(weight - one.dense(), statistics).sum() for one in (base, by_gptq, reround(weight, statistics, base))
    ]
    assert lost[2] < lost[1] < lost[0]


def test_what_a_path_leaves_is_met_too():
    weight, statistics = layer(16, 32, 1)
    base = rtn(weight, statistics, bits=3, group_size=16)
    path = torch.randn(16, 2) @ torch.randn(2, 32) * 0.1
    after = reround(weight - path, statistics, base)
    wanted = weight - path
    assert (losses(wanted - after.dense(), statistics) <= losses(wanted - base.dense(), statistics) * 1.0001).all()


def test_a_perfect_base_stays_as_it_is():
    weight, statistics = layer(8, 32, 2)
    base = rtn(weight, statistics, bits=4, group_size=16)
    assert torch.equal(reround(base.dense(), statistics, base).codes, base.codes)


def test_levels_of_any_distance_are_refused():
    weight, statistics = layer(2, 4, 0)
    codes = torch.zeros(2, 4, dtype=torch.uint8)
    base = CodebookWeight(codes, torch.tensor([0.0, 1.0, 4.0, 9.0]), torch.ones(2, 1), 2, 4)
    with pytest.raises(EoraLabError, match="stored as codebook cannot be rounded again"):
        reround(weight, statistics, base)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama in `model`, and a GPTQ checkpoint of it in 3 bits, rounded to nearest."""
    folder = tmp_path_factory.mktemp("reround")
    model, tokenizer = load_model(save_tiny(folder / "model"))
    grid = {"bits": 3, "group_size": 32, "zero_point": "integer", "scale_dtype": "float16"}
    compress(model, tiny_tokens(), "rtn", method="none", rank=0, inputs="original", progress=False, **grid)
    write_checkpoint(folder / "gptq", model, tokenizer, checkpoint_format="gptq_v2")
    return folder


def test_a_checkpoint_rounded_again_is_written_back_without_a_path(checkpoint, tmp_path):
    """The command, the run, the export: the same grids, other codes, less error in every layer."""
    run, out = tmp_path / "run", tmp_path / "out"
    options = ["--model", str(checkpoint / "model"), "--calibration.nsamples", "8", "--calibration.seqlen", "32"]
    options += ["--no-evaluate", "--inputs", "original"]
    main(["mend", str(checkpoint / "gptq"), str(run), "--reround", "--method", "none", *options])
    model, _, report = load_run(run)
    assert all(layer.error_before <= layer.error_given for layer in report.layers)
    assert sum(layer.error_before for layer in report.layers) < 0.9 * sum(layer.error_given for layer in report.layers)
    assert "rounded again on its own grid: output error" in report.summary()
    main(["export", str(run), str(out), "--format", "gptq_v2"])
    before, after = GptqCheckpoint(checkpoint / "gptq"), GptqCheckpoint(out)
    for name, module in compensated(model).items():
        assert torch.equal(after[name].dense(), module.compressed.dense())
        assert torch.equal(after[name].scales, before[name].scales)
        assert torch.equal(after[name].offsets, before[name].offsets)
    main(["mend", str(checkpoint / "gptq"), str(run), "--reround", "--method", "none", *options])  # resumed: done
    assert main(["mend", str(checkpoint / "gptq"), str(run), "--method", "none", *options]) == 1  # another run


def test_in_turn_with_a_path_it_ends_below_the_path_alone(checkpoint):
    weights = GptqCheckpoint(checkpoint / "gptq")
    lost = {}
    for label, more in {"path": {}, "reround": {"reround": True}, "rounds": {"reround": True, "rounds": 3}}.items():
        model, _ = load_model(checkpoint / "model")
        report = compress(model, tiny_tokens(), rank=8, inputs="original", progress=False, weights=weights, **more)
        lost[label] = [layer.error_after for layer in report.layers]
    assert sum(lost["rounds"]) < sum(lost["reround"]) < sum(lost["path"])
    assert all(b <= a * 1.001 for a, b in zip(lost["reround"], lost["rounds"], strict=True))


def test_what_does_not_come_compressed_cannot_be_rounded_again(checkpoint):
    model, _ = load_model(checkpoint / "model")
    with pytest.raises(EoraLabError, match="only weights that come compressed"):
        compress_model(model, tiny_tokens(), Recipe("rtn", rank=8), reround=True)
    assert main(["mend", str(checkpoint / "gptq"), "out", "--model", str(checkpoint / "model"), "--rounds", "2"]) == 1
