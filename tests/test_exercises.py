"""Exercises: right answers are taken in any form, wrong ones are not, and none is none."""

import math
import zipfile

import nbformat
import pandas
import pytest
import torch

from docs.handout import pack
from docs.notebooks import NOTEBOOKS, Record, digest
from eora_lab import EoraLabError, InputStatistics, solve
from eora_lab.widgets import check
from eora_lab.widgets.exercises import EXERCISES
from tests.tiny import tiny_model


def layer(out: int = 12, channels: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual, second moment) with unequal directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, channels, generator=generator, dtype=torch.float64) * torch.logspace(1, -2, channels)
    x = x @ torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64)).Q
    return torch.randn(out, channels, generator=generator, dtype=torch.float64), x.T @ x / 200


def test_nothing_is_said_of_what_is_not_answered():
    for name in EXERCISES:
        assert check(name, None).right is None and repr(check(name, None)) == f"{name}: not answered yet"
    with pytest.raises(EoraLabError, match=r"unknown exercise 'best pat'.*best path"):
        check("best pat", 1)


def test_numbers_are_told_from_near_ones_and_from_other_things():
    model = tiny_model("llama")
    words = model.get_input_embeddings().weight.shape[0]
    assert check("even guesses", words, model=model).right and check("even guesses", words + 0.4, model=model).right
    assert repr(check("even guesses", words - 1.0, model=model)) == "even guesses: not yet: too low"
    assert "too high" in repr(check("even guesses", words + 1, model=model))
    assert "a number is asked for" in check("even guesses", "many", model=model).hint
    values = {"original": 10.0, "compressed": 100.0, "compressed + EoRA": 20.0}
    assert check("given back", math.log(5) / math.log(10), values=values).right
    assert not check("given back", 80 / 90, values=values).right  # of perplexities themselves
    assert check("bits of a path", 16 * 4 * (32 + 8) / (32 * 8), shape=(32, 8), rank=4).right
    assert not check("bits of a path", 16 * 4 * 32 / (32 * 8), shape=(32, 8), rank=4).right  # one factor forgotten


def test_directions_are_counted_from_the_loudest():
    S = torch.diag(torch.tensor([1.0, 6.0, 3.0]))
    assert check("loud directions", 1, second_moment=S, share=0.6).right
    assert check("loud directions", 2, second_moment=S, share=0.61).right
    assert not check("loud directions", 3, second_moment=S, share=0.61).right


@pytest.mark.parametrize("seed", range(3))
def test_any_best_path_is_right_and_no_other(seed):
    R, S = layer(seed=seed)
    best, svd = (solve(method, R, InputStatistics.from_second_moment(S), 3) for method in ("eora", "svd"))
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q * 7
    for A, B in ((best.A, best.B), (turn @ best.A, best.B @ turn.inverse())):
        assert check("best path", (A, B), residual=R, second_moment=S, rank=3).right
    found = check("best path", (svd.A, svd.B), residual=R, second_moment=S, rank=3)
    assert not found.right and "times the least output error" in found.hint
    assert "asked for" in check("best path", (best.B, best.A), residual=R, second_moment=S, rank=3).hint
    assert "two tensors" in check("best path", best.A, residual=R, second_moment=S, rank=3).hint


def test_svd_is_as_good_where_inputs_are_blind():
    R, S = layer()
    assert check("blind inputs", 3 * torch.eye(9), residual=R, rank=3).right
    found = check("blind inputs", S, residual=R, rank=3)
    assert not found.right and "times what EoRA leaves" in found.hint
    for wrong in (torch.zeros(9, 9), -torch.eye(9), torch.ones(9, 9).triu()):
        assert "no second moment" in check("blind inputs", wrong, residual=R, rank=3).hint
    assert "is asked for" in check("blind inputs", torch.eye(8), residual=R, rank=3).hint


def test_ranks_and_noise_are_read_from_what_a_sweep_measured():
    rows = [
        ("none", 0, 90.0),
        ("svd", 8, 60.0),
        ("svd", 32, 40.0),
        ("eora", 8, 41.0),
        ("eora", 16, 40.0),
        ("eora", 32, 30.0),
    ]
    curves = pandas.DataFrame(rows, columns=["method", "rank", "perplexity.x"])
    assert check("rank as good", 16, curves=curves, metric="perplexity.x").right
    assert check("rank as good", 32, curves=curves, metric="perplexity.x").hint == "too high"
    without = curves[curves["method"] != "svd"]
    assert "add them to methods" in check("rank as good", 16, curves=without, metric="perplexity.x").hint
    assert check("enough sequences", 3, channels=1025, seqlen=512).right
    assert check("enough sequences", 2, channels=1024, seqlen=512).right
    index = pandas.MultiIndex.from_tuples([(4, 300), (64, 4800)], names=["nsamples", "tokens seen"])
    gap = pandas.DataFrame({16: [50.0, 2.0], 128: [90.0, 4.0]}, index=index)
    assert check("most noise", (4, 128), gap=gap).right and not check("most noise", (128, 4), gap=gap).right
    assert "a pair" in check("most noise", 4, gap=gap).hint


def test_a_class_gets_notebooks_with_their_outputs_and_results(tmp_path):
    (path,) = [one for one in NOTEBOOKS if one.name.startswith("02")]
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    shown = {cell.id: [{"output_type": "stream", "name": "stdout", "text": "seen"}]}
    Record(digest(notebook), 60.0, {}, shown).write(tmp_path / f"{path.stem}.json.gz")
    cells = tmp_path / "work" / "notebooks" / "runs" / "03_rank_sweeps"
    (cells / "cache").mkdir(parents=True)
    for name in ("a.json", "cache/b.json"):
        (cells / name).write_text("{}")
    said = pack(tmp_path / "class.zip", tmp_path, tmp_path / "work")
    assert f"{path.stem}: outputs whole" in said and "03: results of 1 cells" in said
    assert any(line.startswith("00_quickstart: outputs not recorded, make record") for line in said)
    with zipfile.ZipFile(tmp_path / "class.zip") as archive:
        names = archive.namelist()
        found = nbformat.reads(archive.read(f"notebooks/{path.name}").decode(), as_version=4)
    assert names[-1] == "notebooks/runs/03_rank_sweeps/a.json" and len(names) == 4
    assert [cell.outputs[0]["text"] for cell in found.cells if cell.get("outputs")] == ["seen"]
