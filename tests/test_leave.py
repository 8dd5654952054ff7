"""What stays as it is by choice: which linears, what a report, a run, a sweep and an export say of them."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from eora_lab import (
    Budget,
    EoraLabError,
    Recipe,
    Report,
    collect_statistics,
    load_model,
    load_run,
    plan_ranks,
    solve_adapter,
)
from eora_lab.cli import main
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.estimate import calibrating, model_shape, solving
from eora_lab.experiment.paper import MEASURED
from eora_lab.experiment.store import ResultStore
from eora_lab.experiment.sweep import sweep
from eora_lab.formats.dense import write_dense
from eora_lab.formats.gptq_checkpoint import GptqCheckpoint, write_checkpoint
from eora_lab.formats.peft import write_adapter
from eora_lab.layer.linear import CompensatedLinear, compensated
from eora_lab.model.structure import block_linears
from eora_lab.run.stored import run_factors
from tests.test_experts import mixture as experts
from tests.tiny import CELL, CONFIGS, SMALL, compress, logits, save_tiny, tiny_model, tiny_tokens

INTEGER = {"group_size": 32, "zero_point": "integer", "scale_dtype": "float16", "bits": 4}


class Mixture(torch.nn.Module):
    """Two experts that a router weighs, and one for all tokens behind a gate of one row, as in Qwen2-MoE."""

    def __init__(self, mlp):
        super().__init__()
        self.gate = torch.nn.Linear(64, 2, bias=False)
        self.experts = torch.nn.ModuleList([mlp, tiny_model("llama", seed=1).model.layers[0].mlp])
        self.shared_expert = tiny_model("llama", seed=2).model.layers[0].mlp
        self.shared_expert_gate = torch.nn.Linear(64, 1, bias=False)

    def forward(self, x):
        shares = self.gate(x).softmax(-1).unbind(-1)
        y = sum(share[..., None] * expert(x) for share, expert in zip(shares, self.experts, strict=True))
        return y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


def mixture() -> torch.nn.Module:
    model = tiny_model("llama")
    torch.manual_seed(0)
    for block in model.model.layers:
        block.mlp = Mixture(block.mlp)
    return model


def left_of(model) -> list[str]:
    """The linears of the blocks that were not compressed, without the blocks' own names."""
    return [name.removeprefix("model.layers.") for name in block_linears(model)]


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
BLOCK = [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in MLP]
CHOICES = [
    ({"skip": "down_proj|k_proj"}, [f"{i}.{n}" for i in (0, 1) for n in ("self_attn.k_proj", "mlp.down_proj")], "skip"),
    ({"skip": r"layers\.0\.mlp"}, [f"0.mlp.{name}" for name in MLP], "skip"),
    ({"only": "mlp"}, [f"{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION], "only"),
    ({"keep_first": 1}, [f"0.{name}" for name in BLOCK], "first blocks"),
    ({"keep_last": 1}, [f"1.{name}" for name in BLOCK], "last blocks"),
]


@pytest.mark.parametrize("settings", [{}, {"inputs": "original"}, {"true_sequential": True}])
@pytest.mark.parametrize(("choice", "left", "reason"), CHOICES)
def test_what_is_chosen_stays_and_the_rest_is_compressed(choice, left, reason, settings):
    model, tokens = tiny_model("llama"), tiny_tokens()
    before = {name: linear.weight for name, linear in block_linears(model).items()}
    report = compress(model, tokens, **SMALL | choice | settings)
    after = {name: linear for name, linear in model.named_modules() if name in before}
    stayed = [name for name, linear in after.items() if not isinstance(linear, CompensatedLinear)]
    assert stayed == [f"model.layers.{name}" for name in left]
    assert all(after[name].weight is before[name] for name in stayed)
    assert [layer.name for layer in report.layers] == [name for name in before if name not in stayed]
    assert report.by_choice.keys() == {reason} and sum(report.by_choice[reason].values()) == sum(report.left.values())
    everything = sum(weight.numel() for weight in before.values())
    assert report.coverage == pytest.approx(report.weights / everything) and not report.overlooked
    assert f"M, {reason})" in str(report) and "left as they are" not in str(report)


def test_what_is_left_changes_nothing_else():
    tokens, part, whole = tiny_tokens(), tiny_model("llama"), tiny_model("llama")
    settings = SMALL | {"inputs": "original"}
    some = {layer.name: layer for layer in compress(part, tokens, skip="up_proj", **settings).layers}
    for layer in compress(whole, tokens, **settings).layers:
        if layer.name in some:
            assert some[layer.name].error_after == layer.error_after


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_dense_model_has_nothing_that_stays_by_itself(kind):
    assert Recipe().left(tiny_model(kind)) == {}


GATES = [f"{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "shared_expert_gate")]


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ({}, GATES),
        ({"skip": "attn"}, [f"{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION] + GATES),
        ({"only": "mlp"}, [f"{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION] + GATES),
        ({"only": r"mlp[.]gate$|proj"}, [f"{i}.mlp.shared_expert_gate" for i in (0, 1)]),
        ({"only": "."}, []),
        ({"only": ".", "skip": "expert_gate"}, [f"{i}.mlp.shared_expert_gate" for i in (0, 1)]),
    ],
)
def test_routers_and_gates_of_one_row_stay_unless_they_are_named(choice, left):
    model = mixture()
    wanted = {f"model.layers.{name}" for name in left}
    assert Recipe(**choice).left(model).keys() == wanted
    report = compress(model, tiny_tokens(), **SMALL | choice)
    assert not {layer.name for layer in report.layers} & wanted and not report.overlooked
    if not choice:
        assert report.by_choice == {"router": {"model.layers.*.mlp.gate.weight": 256}}  # one row is no matrix


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mlp.router", "router"),
        ("feed_forward.router.layer", "router"),
        ("mlp.gate.wg", "router"),
        ("self_attn.indexer.wq_b", "indexer"),
        ("mlp.gate_proj", None),
        ("mlp.gate_up_proj", None),
        ("mlp.experts.0.gate_proj", None),
        ("self_attn.output_gate", None),
        ("per_layer_input_gate", None),
    ],
)
def test_names_that_choose_for_others(name, reason):
    model = tiny_model("llama")
    parent, _, last = name.rpartition(".")
    place = model.model.layers[0]
    for part in parent.split(".") if parent else ():
        if not hasattr(place, part):
            place.add_module(part, torch.nn.Module())
        place = place.get_submodule(part)
    setattr(place, last, torch.nn.Linear(64, 8))
    assert Recipe().left(model).get(f"model.layers.0.{name}") == reason


def test_a_router_that_is_no_linear_is_left_by_choice():
    model = mixture()
    for block in model.model.layers:
        weight = block.mlp.gate.weight
        block.mlp.gate = torch.nn.Module()
        block.mlp.gate.weight = weight
        block.mlp.gate.forward = lambda x, weight=weight: x @ weight.T
    report = compress(model, tiny_tokens(), **SMALL)
    assert report.by_choice["router"] == {"model.layers.*.mlp.gate.weight": 256} and not report.overlooked


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"skip": "down_prj"},
            r"skip 'down_prj' matches no linear in the decoder blocks: names are like model\.layers",
        ),
        ({"skip": "down_prj"}, r"did you mean down_proj\?"),
        ({"only": "vision"}, "only 'vision' matches no linear"),
        (
            {"keep_first": 1, "keep_last": 1},
            r"nothing is left to compress in the 2 blocks by keep_first 1, keep_last 1 \(first blocks, last blocks\)",
        ),
        (
            {"only": "mlp", "skip": "proj"},
            r"nothing is left to compress in the 2 blocks by skip proj, only mlp \(skip\)",
        ),
    ],
)
def test_a_choice_that_cannot_be_meant(choice, message):
    model = tiny_model("llama")
    with pytest.raises(EoraLabError, match=message) as raised:
        compress(model, tiny_tokens(), **SMALL | choice)
    assert "\n" not in str(raised.value) and not compensated(model)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"skip": "("}, r"'\(' is no regular expression: missing"),
        ({"only": "*"}, "is no regular expression"),
        ({"keep_first": -1}, "keep_first must be 0 or more, not -1"),
        ({"keep_last": "two"}, "keep_last must be a whole number"),
    ],
)
def test_settings_are_checked_when_they_are_made(choice, message):
    with pytest.raises(EoraLabError, match=message):
        Recipe(**choice)


def test_a_budget_is_that_of_the_compressed_layers():
    model, tokens = tiny_model("llama"), tiny_tokens()
    statistics = collect_statistics(model, tokens, progress=False)
    recipe, budget = Recipe("rtn", bits=3, group_size=32, rank=16, skip="mlp"), Budget("relative")
    ranks = plan_ranks(model, statistics, recipe, budget, progress=False)
    assert ranks.keys() == {name for name in block_linears(model) if "mlp" not in name}
    report = compress(model, tokens, **SMALL | {"rank": 16, "skip": "mlp", "inputs": "original"}, ranks=budget)
    assert {layer.name: layer.rank for layer in report.layers} == ranks


def test_a_run_knows_its_choice_and_loads_back(tmp_path):
    name, tokens = save_tiny(tmp_path / "model"), tiny_tokens()
    settings = SMALL | {"folder": tmp_path / "run", "keep_first": 1, "skip": "k_proj"}
    model, _ = load_model(name)
    report = compress(model, tokens, **settings)
    loaded, _, read = load_run(tmp_path / "run")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens)) and read == report
    assert compensated(loaded).keys() == {layer.name for layer in report.layers}
    said = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (said["skip"], said["only"], said["keep_first"], said["keep_last"]) == ("k_proj", "", 1, 0)
    for other in ({"skip": "q_proj"}, {"keep_first": 0}, {"only": "proj"}):
        with pytest.raises(EoraLabError, match=rf"holds another run \({next(iter(other))} was"):
            compress(load_model(name)[0], tokens, **settings | other)
    again, _ = load_model(name)
    compress(again, tokens, **settings)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_run_of_a_version_without_the_settings_resumes(tmp_path):
    name, tokens = save_tiny(tmp_path / "model"), tiny_tokens()
    settings = SMALL | {"folder": tmp_path / "run"}
    model, _ = load_model(name)
    compress(model, tokens, **settings)
    config, file = tmp_path / "run" / "config.json", tmp_path / "run" / "report.json"
    said, report = json.loads(config.read_text()), json.loads(file.read_text())
    for key in ("skip", "only", "keep_first", "keep_last"):
        del said["settings"][key]
    del report["by_choice"]
    config.write_text(json.dumps(said))
    file.write_text(json.dumps(report))
    assert load_run(tmp_path / "run")[2].by_choice == {}
    with pytest.raises(EoraLabError, match=r"holds another run \(skip was '', now 'k_proj'\)"):
        compress(load_model(name)[0], tokens, **settings | {"skip": "k_proj"})
    again, _ = load_model(name)
    compress(again, tokens, **settings)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_report_tells_what_was_chosen_from_what_was_not():
    one = Report(
        left={"a": 3_000_000, "b": 2_000_000}, by_choice={"skip": {"a": 1_000_000}, "router": {"b": 2_000_000}}
    )
    assert one.overlooked == {"a": 2_000_000} and one.overlooked_share == pytest.approx(0.4)
    line = one.coverage_line()
    assert "left by choice: b (2 M, router), a (1 M, skip); left as they are: a (2 M)" in line
    assert Report.from_json(one.to_json()) == one


def test_cells_differ_by_what_they_leave_and_count_it_as_it_is(workplace):
    grid = CELL | {"bits": 3, "method": "none"}
    frame = sweep(
        [CELL | {"compressor": "dense"}, grid | {"skip": ["", "down_proj"]}, grid | {"keep_first": 1}],
        "store",
        announce=lambda _: None,
    )
    dense, whole, part, first = (row for _, row in frame.iterrows())
    assert list(frame["skip"][1:]) == ["", "down_proj", ""] and list(frame["keep_first"][1:]) == [0, 0, 1]
    assert len({row["perplexity.text.txt"] for row in (whole, part, first)}) == 3
    assert whole["nbytes"] < part["nbytes"] < first["nbytes"] < dense["nbytes"]
    assert part["bits_per_weight"] == pytest.approx(32 * part["nbytes"] / dense["nbytes"])
    assert [len(cell["result"]["layers"]) for cell in ResultStore("store").cells() if "skip" in cell["config"]] == [12]


def test_a_cell_that_leaves_nothing_is_called_as_before():
    for file in MEASURED.glob("*/**/*.json"):
        config = json.loads(file.read_text())["config"]
        assert Cell.from_config(config).config() == config
    plain = Cell(recipe=Recipe()).config()
    assert plain["only"] == "" and not plain.keys() & {"skip", "keep_first", "keep_last", "rank_only"}
    choice = {"skip": "q_proj", "only": "attn", "keep_first": 1, "keep_last": 2}
    named = Cell.from_config(plain | choice | {"rank_only": "o_proj"})
    assert choice.items() <= named.config().items() and named.recipe.selection() == choice
    assert Cell.from_config(named.config()) == named
    assert named.recipe.base == "gptq 4-bit g64 skip q_proj only attn keep first 1 keep last 2"


def test_an_older_cell_in_which_only_chose_ranks_is_not_taken_for_one_that_leaves_layers():
    """Its configuration named `only` what is `rank_only` now: a store must not return its number."""
    older = Cell().config() | {"only": "q_proj"}
    since = {"skip": "", "keep_first": 0, "keep_last": 0, "rank_only": "", "labels": "model", "distil": False}
    since |= {"shared_factors": False, "preserve": False}
    assert Cell.from_config(older).config() == older | since
    assert Cell.from_config(Cell.from_config(older).config()).config() == Cell.from_config(older).config()


def test_an_estimate_counts_what_is_compressed(workplace):
    shape = model_shape("model")
    whole, part = (Cell.from_config(CELL | {"skip": skip}) for skip in ("", "mlp"))
    assert solving(part, shape) < solving(whole, shape) and calibrating(part, shape) < calibrating(whole, shape)


def test_a_dense_export_holds_what_was_left_as_it_was(tmp_path):
    name, tokens = save_tiny(tmp_path / "model"), tiny_tokens()
    model, tokenizer = load_model(name)
    compress(model, tokens, **SMALL | {"skip": "q_proj"})
    write_dense(tmp_path / "dense", model, tokenizer, torch.float32, merge=True)
    exported, original = load_model(str(tmp_path / "dense"))[0], load_model(name)[0]
    torch.testing.assert_close(logits(exported, tokens), logits(model, tokens), rtol=1e-4, atol=1e-5)
    for module, linear in block_linears(original).items():
        assert torch.equal(exported.get_submodule(module).weight, linear.weight) == ("q_proj" in module)


@pytest.mark.parametrize("choice", [{"skip": "down_proj"}, {"keep_first": 1}, {"only": r"self_attn|1[.]mlp"}])
def test_a_gptq_checkpoint_names_what_is_not_quantised(choice, tmp_path):
    name, tokens = save_tiny(tmp_path / "model"), tiny_tokens()
    model, tokenizer = load_model(name)
    compress(model, tokens, "gptq", **INTEGER | choice | {"method": "none", "rank": 0, "progress": False})
    write_checkpoint(tmp_path / "gptq", model, tokenizer, torch.float32, "gptq_v2")
    quantised = compensated(model).keys()
    said = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert said == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert said["modules_in_block_to_quantize"] == [sorted(quantised)]
    for module in block_linears(load_model(name)[0]):  # as loaders read it: from the beginning of a name
        excluded = any(re.match(pattern.removeprefix("-:"), module) for pattern in said["dynamic"])
        assert excluded == (module not in quantised)
    if "keep_first" in choice:
        assert any(re.match(one.removeprefix("-:"), "model.layers.0.self_attn.qkv_proj") for one in said["dynamic"])
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    assert {key for key in stored if key.endswith(".qweight")} == {f"{module}.qweight" for module in quantised}
    checkpoint, original = GptqCheckpoint(tmp_path / "gptq"), load_model(name)[0]
    checkpoint.check_model(original)
    report = compress(original, tokens, weights=checkpoint, rank=8, progress=False)
    assert {layer.name for layer in report.layers} == quantised


def test_on_the_command_line(workplace, capsys):
    texts = ["--calibration.source", "text.txt", "--calibration.nsamples", "4", "--calibration.seqlen", "32"]
    small = ["--model", "model", "--group-size", "32", "--rank", "8", "--no-evaluate", *texts]
    assert main(["compress", "run", *small, "--skip", "down_proj", "--keep-first", "1"]) == 0
    out, err = capsys.readouterr()
    assert "model.layers.*.mlp.down_proj.weight (0.0082 M, skip)" in out and "warning" not in err
    assert main(["compress", "run", *small, "--skip", "up_proj", "--keep-first", "1"]) == 1
    assert "holds another run (skip was 'down_proj', now 'up_proj')" in capsys.readouterr().err
    Path("model/model.safetensors").write_bytes(b"no weights")  # who loads them says so
    assert main(["compress", "other", *small, "--only", "down_prj"]) == 1
    assert "only 'down_prj' matches no linear" in capsys.readouterr().err
    Path("grid.yaml").write_text(json.dumps(CELL | asdict(Recipe("rtn", rank=8)) | {"skip": ["", "x_proj"]}))
    assert main(["sweep", "grid.yaml", "--store", "store"]) == 1
    assert "skip 'x_proj' matches no linear" in capsys.readouterr().err


def test_adapters_of_a_run_are_those_of_its_compressed_layers(tmp_path):
    name, tokens = save_tiny(tmp_path / "model"), tiny_tokens()
    compress(load_model(name)[0], tokens, **SMALL | {"folder": tmp_path / "run", "skip": "up_proj", "keep_last": 1})
    model, tokenizer, report = load_run(tmp_path / "run")
    layers = {layer.name for layer in report.layers}
    write_adapter(tmp_path / "universal", run_factors(tmp_path / "run"), name, universal=True)
    write_dense(tmp_path / "dense", model, tokenizer, torch.float32)
    base = load_model(str(tmp_path / "dense"))[0]
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "universal").eval()
    torch.testing.assert_close(logits(adapted, tokens), logits(model, tokens), rtol=1e-3, atol=1e-4)
    solved = solve_adapter(model, load_model(name)[0], tiny_tokens(seed=1), Recipe(rank=8), progress=False)
    assert solved.keys() == layers and len(layers) == 6


@pytest.mark.parametrize("choice", [{"skip": r"experts\.1\."}, {"only": r"experts\.[023]\."}])
def test_an_expert_that_stays_counts_for_the_others_of_its_mixture(choice):
    tokens, settings = tiny_tokens(), SMALL | {"inputs": "original"}
    whole = {layer.name: layer for layer in compress(experts(), tokens, **settings).layers}
    report = compress(experts(), tokens, **settings | choice)
    found = {layer.name: layer for layer in report.layers if "experts" in layer.name}
    assert len(found) == 12 and not report.overlooked and "router" in report.by_choice
    for name, layer in found.items():
        assert (layer.error_after, layer.pooled_tokens) == (whole[name].error_after, whole[name].pooled_tokens)
