"""What `docs.predict` sums up: held against what torch counts, and against what a run held in memory."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from docs.predict import H100, MACHINES, Model, Pass, of_block, of_solve, peak, predicted, skeleton
from eora_lab.calibrate.contract import check_blocks
from eora_lab.model.structure import decoder_blocks
from eora_lab.run.memory import needed
from eora_lab.run.recipe import Recipe
from tests.tiny import CONFIGS, tiny_model, tiny_tokens

WHAT = Pass(Recipe("rtn", bits=3, group_size=32, rank=8), nsamples=6, seqlen=32)


def test_products_of_a_block_are_those_that_torch_counts():
    model = tiny_model("llama")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tiny_tokens())
    counts = counter.get_flop_counts()
    linears = sum(flops for name, one in counts.items() if name.endswith("_proj") for flops in one.values())
    split, _ = of_block(Model(model, {0: 1}), 0, WHAT)
    attention = 2 * 4 * WHAT.tokens * WHAT.seqlen * 64
    assert split["forward"]["model"] == 2 * linears / 2 + attention  # two passes; torch counted two blocks


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_peak_is_that_of_the_package_beside_one_block(kind):
    model = tiny_model(kind)
    there = sum(needed(model, WHAT.recipe, check_blocks(model, tiny_tokens()), (6, 32)).values())
    block = sum(p.nbytes for p in next(iter(decoder_blocks(model).values())).parameters())
    assert peak(Model(model, {0: 1}), WHAT) == there + block


def test_more_devices_never_take_longer_and_more_blocks_take_as_many_times_longer():
    model = Model(skeleton(CONFIGS["llama"][0](hidden_size=2048, intermediate_size=5632, num_hidden_layers=1,
                                               num_attention_heads=16)), {0: 8})  # fmt: skip
    one, eight = (sum(predicted(model, WHAT, H100, devices).values()) for devices in (1, 8))
    assert one / 8 < eight < one
    twice = predicted(Model(model.modules, {0: 16}), WHAT, H100)
    assert twice == pytest.approx({step: 2 * value for step, value in predicted(model, WHAT, H100).items()})
    assert {machine.keys() == H100.keys() for machine in MACHINES.values()} == {True}


def test_a_layer_too_small_for_a_krylov_space_is_solved_by_eigenvectors():
    assert of_solve(576, 576, 64)["eigen"] == 10 * 576**3
    assert of_solve(4096, 4096, 64)["eigen"] == 10 * 480**3
