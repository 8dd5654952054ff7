"""The explorable: its numbers are those of the package, and one front-end shows them on pages and in notebooks."""

import base64
import copy

import numpy as np
import pytest
import torch

from eora_lab import EoraLabError, Exploration, Recipe, calibration_batches, collect_statistics
from eora_lab.calibrate.statistics import output_energy
from eora_lab.measure.at_rank import AtRank
from eora_lab.measure.layer_view import DECADES, layer_view, rank_stops
from eora_lab.model.structure import block_linears
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

LAYER, NARROW = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"  # the latter has 32 rows
METHODS = ("svd", "act_s", "eora")


@pytest.fixture(scope="module")
def exploration(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)
    model = tiny_model("llama")
    batches = calibration_batches(tiny_tokenizer(), str(text), 4, 32)
    return Exploration(model, collect_statistics(model, batches, progress=False), Recipe("rtn", bits=2, group_size=32))


# --- what is shown -------------------------------------------------------------------------------------------------


def test_ranks_double_in_two_steps():
    assert rank_stops(64) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert rank_stops(20) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert rank_stops(1) == [0, 1]


def test_a_view_says_what_solving_at_each_rank_leaves(exploration):
    ranks = [0, 3, 64]
    view = layer_view(exploration, LAYER, METHODS, ranks)
    R, W = exploration.residual(LAYER).double(), exploration.weight(LAYER).double()
    S = exploration.statistics[LAYER].second_moment.double()
    assert view["error"] == pytest.approx(output_energy(R, S) / output_energy(W, S), rel=1e-3)
    for method in METHODS:
        for rank, left in zip(ranks, view["left"][method], strict=True):
            kept = R - exploration.answer(LAYER, method).truncate(rank).dense().double()
            assert left == pytest.approx(output_energy(kept, S) / output_energy(R, S), rel=1e-3, abs=1e-5)
    for method, covariance in (("svd", R @ R.T), ("eora", R @ S @ R.T)):
        values = torch.linalg.eigvalsh(covariance).flip(0)
        for direction, share in view["spectra"][method]:
            assert share == pytest.approx((values[direction - 1] / values.sum()).item(), rel=1e-2, abs=1e-8)
        assert view["taken"][method] == pytest.approx([0, (values[:3].sum() / values.sum()).item(), 1], rel=1e-3)
    for method in ("svd", "eora"):
        codes = np.frombuffer(base64.b64decode(view["maps"][method][1]), np.uint8).reshape(
            view["rows"], view["columns"]
        )
        energies = exploration.error_map(LAYER, method, 3, view["rows"], doubling=True).numpy()
        low, high = DECADES
        shown = low + (high - low) * codes / 255
        assert np.allclose(shown, np.log10(energies.clip(10**low, 10**high)), atol=(high - low) / 500)


def test_columns_of_a_doubling_map_are_directions_and_the_last_is_there(exploration):
    whole = exploration.error_map(LAYER, "svd", 2, bins=1000)  # a column a direction
    columns = whole.shape[1]
    doubling = exploration.error_map(LAYER, "svd", 2, bins=16, doubling=True)
    rows = whole.unflatten(0, (16, -1)).mean(1)
    assert torch.allclose(doubling[:, 0], rows[:, 0], rtol=1e-4)  # the loudest alone
    assert torch.allclose(doubling[:, -1], rows[:, int((columns + 1) ** (15 / 16)) - 1 :].mean(1), rtol=1e-4)
    tiny = exploration.error_map(NARROW, "svd", 0, bins=300, doubling=True)
    assert torch.isfinite(tiny).all()


def test_a_view_stops_at_what_a_layer_allows(exploration):
    view = layer_view(exploration, NARROW, METHODS, [0, 32, 64])
    assert all(left[1] == left[2] < 1e-4 for left in view["left"].values())
    with pytest.raises(EoraLabError, match="no layer 'lm_head'"):
        layer_view(exploration, "lm_head", METHODS, [0])


# --- a model at a rank ---------------------------------------------------------------------------------------------


def test_a_model_at_a_rank_has_what_solving_at_this_rank_gives(exploration):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    whole = AtRank(model, exploration, progress=False)
    assert whole.highest == 64
    for method, rank in (("svd", 5), ("eora", 40), ("eora", 0)):
        linears = block_linears(whole.model(method, rank))
        for layer in exploration.layers:
            path = exploration.answer(layer, method).truncate(rank).dense()
            compressed = exploration.weight(layer) - exploration.residual(layer)
            assert torch.allclose(linears[layer].weight, compressed + path, atol=1e-6), (layer, method, rank)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(EoraLabError, match="unknown method 'sdv'"):
        whole.model("sdv", 1)


def test_at_the_highest_rank_the_original_is_back(exploration):
    model = tiny_model("llama")
    tokens = torch.arange(24)[None]
    at = AtRank(model, exploration, progress=False).model("eora", 64)
    assert torch.allclose(at(tokens).logits, model(tokens).logits, atol=1e-3)


def test_bits_of_the_path_are_those_of_its_factors(exploration):
    shapes = [exploration.weight(layer).shape for layer in exploration.layers]
    bits = sum(16 * min(40, *shape) * sum(shape) for shape in shapes) / sum(shape.numel() for shape in shapes)
    assert AtRank(tiny_model("llama"), exploration, progress=False).path_bits(40) == pytest.approx(bits)
