"""PEFT adapters: written for and checked against other loaders, switched on one model, solved anew for a task."""

import io
import json
import sys

import peft
import pytest
import torch
from safetensors.torch import save_file

from eora_lab import EoraLabError, load_model, load_run, perplexity
from eora_lab.cli import main
from eora_lab.formats.adapter_check import check_adapter, fix_adapter
from eora_lab.formats.peft import SERVED_RANKS, read_files, write_adapter
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.run.adapters import Adapters
from eora_lab.run.folder import load_original, read_report
from eora_lab.run.recipe import Recipe
from eora_lab.run.task_adapter import solve_adapter
from tests.tiny import CONFIGS, calibrated, compress, tiny_model, tiny_tokenizer, tiny_tokens

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
SMALL = {"bits": 2, "group_size": 32, "progress": False}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_tokens(3, seed=9)).logits


def save_model(folder, kind: str, template: str | None = TEMPLATE) -> str:
    tiny_model(kind).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_run(folder, source: str, ranks: dict[str, int] | None = None, rank: int = 12):
    model, _ = load_model(source)
    compress(model, tiny_tokens(), **SMALL, rank=rank, ranks=ranks, folder=folder)
    return model


def ragged_ranks() -> dict[str, int]:
    """0, 5, 10, 0, 5, ... by layer; the second block's q, k and v at 0, 5 and 10."""
    names = [n for n, m in tiny_model("llama").named_modules() if n.endswith("_proj")]
    return {name: 5 * (i % 3) for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, and a run of it with rank 12 in every layer."""
    folder = tmp_path_factory.mktemp("adapters")
    save_model(folder / "model", "llama")
    make_run(folder / "run", str(folder / "model"))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return folder


@pytest.fixture
def universal(place, tmp_path):
    """A universal adapter of the run, to break: (tensors, config, folder)."""
    assert main(["adapter", "export", str(place / "run"), str(tmp_path / "universal"), "--universal"]) == 0
    return *read_files(tmp_path / "universal"), tmp_path / "universal"


@pytest.fixture(scope="module")
def shapes():
    model = tiny_model("llama")
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith("_proj")}


def bare(run, kind: str = "llama"):
    """The original architecture with W^ as plain weights: what another tool would load the adapter on."""
    model, compressed = tiny_model(kind), load_run(run)[0]
    for name, module in compressed.named_modules():
        if isinstance(module, CompensatedLinear):
            model.get_submodule(name).weight.data.copy_(module.compressed.dense())
    return model


def in_peft(folder, base):
    return peft.PeftModel.from_pretrained(base, folder).eval()


# --- out -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("form", ["ragged", "universal"])
def test_both_forms_give_the_same_logits_in_peft(kind, form, tmp_path, recwarn):
    source = save_model(tmp_path / "model", kind)
    model = make_run(tmp_path / "run", source, ranks=ragged_ranks())
    flag = ["--universal"] if form == "universal" else []
    assert main(["adapter", "export", str(tmp_path / "run"), str(tmp_path / "out"), *flag]) == 0
    adapted = in_peft(tmp_path / "out", bare(tmp_path / "run", kind))
    torch.testing.assert_close(logits(adapted), logits(model), rtol=0, atol=1e-5)
    assert (logits(bare(tmp_path / "run", kind)) - logits(model)).abs().max() > 1e-3  # the path matters
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    tensors, config = read_files(tmp_path / "out")
    ranks = {key: len(tensor) for key, tensor in tensors.items() if ".lora_A." in key}
    assert config["r"] == config["lora_alpha"] and config["rank_pattern"] == config["alpha_pattern"]
    if form == "universal":
        assert set(ranks.values()) == {16} and len(ranks) == 14 and config["rank_pattern"] == {}
    else:
        assert set(ranks.values()) == {5, 10} and config["r"] == 10


def test_ranks_of_the_universal_form_are_served_ones(tmp_path):
    for rank, served in ((1, 1), (2, 8), (64, 64), (65, 128), (300, 320), (512, 512)):
        write_adapter(tmp_path, {"m.q_proj": (torch.ones(rank, 600), torch.ones(600, rank))}, "model", universal=True)
        tensors, config = read_files(tmp_path)
        assert config["r"] == len(tensors["base_model.model.m.q_proj.lora_A.weight"]) == served in SERVED_RANKS
    with pytest.raises(EoraLabError, match="rank 513 is above 512"):
        write_adapter(tmp_path, {"q": (torch.ones(513, 600), torch.ones(600, 513))}, "model", universal=True)


def test_a_run_without_a_path_has_no_adapter(place, tmp_path, capsys):
    make_run(tmp_path / "run", str(place / "model"), rank=0)
    assert not (tmp_path / "run" / "adapter").exists()
    assert main(["adapter", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    assert "has no low-rank path" in capsys.readouterr().err


# --- check ---------------------------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.1.self_attn.q_proj"


def without(*words):
    return lambda tensors, config: [tensors.pop(k) for k in list(tensors) if any(word in k for word in words)]


def setting(**changes):
    return lambda tensors, config: config.update(changes)


def replaced(key, change):
    return lambda tensors, config: tensors.update({key: change(tensors[key])})


def added(key, tensor):
    return lambda tensors, config: tensors.update({key: tensor})


def ragged(tensors, config):
    """One layer at another rank, named as GPTQModel does: in rank_pattern only."""
    tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"] = torch.ones(4, 64), torch.ones(64, 4)
    config["rank_pattern"] = {"model.layers.1.self_attn.q_proj": 4}


BROKEN = {
    "no alpha pattern": (ragged, "peft", "scales model.layers.1.self_attn.q_proj by 4, 1 is meant"),
    "alpha pattern unlike": (
        setting(alpha_pattern={"q_proj": 32}),
        "sglang",
        "scales model.layers.0.self_attn.q_proj (and 1 more) by 1, 2 is meant",
    ),
    "alpha pattern in a converter": (setting(alpha_pattern={"q_proj": 32}), "llama.cpp", "by 1, 2 is meant"),
    "rslora in a converter": (setting(use_rslora=True), "llama.cpp", "by 1, 4 is meant"),
    "alpha": (setting(lora_alpha=32), "gptqmodel", "by 1, 2 is meant"),
    "rslora": (setting(use_rslora=True), "sglang", "by 1, 4 is meant"),
    "rank too high": (setting(r=600, lora_alpha=600), "vllm", "refuses rank 600: at most 512"),
    "rank above r": (setting(r=8, lora_alpha=8), "vllm", "reserves room for rank 8, a layer has 16"),
    "rank in the file": (setting(r=8, lora_alpha=8), "peft", "rank 16 in the file, 8 in the configuration"),
    "uneven ranks": (ragged, "sglang", "q_proj has 4"),
    "no q": (without("q_proj"), "sglang", "layers.0.self_attn (and 1 more) lacks q_proj"),
    "no v": (without("1.self_attn.v_proj"), "sglang", "model.layers.1.self_attn lacks v_proj"),
    "no gate": (without("1.mlp.gate_proj"), "sglang", "model.layers.1.mlp lacks gate_proj"),
    "targets by a pattern": (setting(target_modules=".*_proj"), "sglang", "refuses target_modules '.*_proj'"),
    "missing module": (without("1.mlp.down_proj"), "gptqmodel", "model.layers.1.mlp.down_proj has none"),
    "missing half": (without("1.mlp.down_proj.lora_B"), "any", "missing of model.layers.1.mlp.down_proj"),
    "untargeted": (setting(target_modules=["q_proj"]), "peft", "ignores"),
    "no target": (setting(target_modules=None), "vllm", "needs target_modules"),
    "modules_to_save": (setting(modules_to_save=["lm_head"]), "vllm", "refuses modules_to_save (lm_head)"),
    "one module to save": (setting(modules_to_save="lm_head"), "vllm", "refuses modules_to_save (lm_head)"),
    "dora": (setting(use_dora=True), "vllm", "refuses DoRA"),
    "dora in sglang": (setting(use_dora=True), "sglang", "refuses DoRA"),
    "dora in gptqmodel": (setting(use_dora=True), "gptqmodel", "ignores DoRA's magnitudes"),
    "bias": (setting(bias="all"), "vllm", "refuses biases"),
    "lora_bias": (setting(lora_bias=True), "vllm", "refuses biases in an adapter (lora_bias)"),
    "activated": (setting(alora_invocation_tokens=[1]), "vllm", "refuses activated LoRA"),
    "replication": (setting(layer_replication=[[0, 2]]), "vllm", "refuses layer_replication"),
    "block-diagonal": (setting(use_bdlora={"q_proj": 2}), "vllm", "refuses block-diagonal LoRA"),
    "QA-LoRA": (setting(use_qalora=True), "vllm", "refuses QA-LoRA"),
    "PiSSA": (setting(init_lora_weights="pissa"), "vllm", "refuses init_lora_weights 'pissa'"),
    "unknown key": (added(f"{Q}.lora_magnitude_vector", torch.ones(64)), "any", "is no lora_A or lora_B matrix"),
    "unknown module": (
        added("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", torch.ones(16, 64)),
        "any",
        "the model has no linear model.layers.7.mlp.up_proj",
    ),
    "A's shape": (replaced(f"{Q}.lora_A.weight", lambda t: t[:, :63]), "any", "is for 63 inputs, the layer has 64"),
    "B's shape": (replaced(f"{Q}.lora_B.weight", lambda t: t[:63]), "any", "is for 63 outputs, the layer has 64"),
    "halves' ranks": (replaced(f"{Q}.lora_B.weight", lambda t: t[:, :8]), "any", "lora_A has rank 16, lora_B 8"),
    "NaN": (replaced(f"{Q}.lora_B.weight", lambda t: t * torch.nan), "any", "has NaN or Inf"),
    "spelling": (
        lambda tensors, config: [
            tensors.update({k.replace("q_proj", "Q_proj"): tensors.pop(k)}) for k in list(tensors)
        ],
        "any",
        "is spelt otherwise in the model (model.layers.0.self_attn.q_proj)",
    ),
}


@pytest.mark.parametrize(
    "change",
    [
        setting(rank_pattern={"q_proj": 16}, alpha_pattern={"q_proj": 16}),
        setting(modules_to_save=["score"], init_lora_weights="gaussian"),
        without("1.mlp.up_proj", "1.self_attn.k_proj"),
        ragged,
    ],
)
def test_what_vllm_takes_is_not_named(universal, shapes, change):
    tensors, config, _ = universal
    change(tensors, config)
    config["alpha_pattern"] = config["rank_pattern"]
    assert [f for f in check_adapter(tensors, config, shapes) if f.loader == "vllm"] == []


def test_sglang_fills_in_k_and_up(universal, shapes):
    tensors, config, _ = universal
    without("1.mlp.up_proj", "1.self_attn.k_proj")(tensors, config)
    assert [f for f in check_adapter(tensors, config, shapes) if f.loader == "sglang"] == []


@pytest.mark.parametrize("name", BROKEN)
def test_what_a_loader_gets_wrong_is_named(universal, shapes, name):
    tensors, config, _ = universal
    assert check_adapter(tensors, config, shapes) == []
    breaks, loader, words = BROKEN[name]
    breaks(tensors, config)
    findings = [str(finding) for finding in check_adapter(tensors, config, shapes)]
    assert any(text.startswith(f"{loader}: ") and words in text for text in findings), findings


def test_upper_case_names_are_not_found_by_gptqmodel():
    pair = {"A": torch.ones(8, 4), "B": torch.ones(4, 8)}
    tensors = {f"base_model.model.h.0.Wqkv.lora_{half}.weight": tensor for half, tensor in pair.items()}
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["Wqkv"]}
    (finding,) = check_adapter(tensors, config, {"h.0.Wqkv": (4, 4)})
    assert finding.loader == "gptqmodel" and "h.0.Wqkv" in finding.problem
    lower = {key.replace("Wqkv", "wqkv"): tensor for key, tensor in tensors.items()}  # as GPTQModel writes it
    assert "spelt otherwise" in str(check_adapter(lower, config, {"h.0.Wqkv": (4, 4)})[0])
    assert list(fix_adapter(lower, config, {"h.0.Wqkv": (4, 4)})) == ["h.0.Wqkv"]


def test_a_ragged_run_is_named_on_the_command_line_and_mended(place, tmp_path, capsys):
    make_run(tmp_path / "run", str(place / "model"), ranks=ragged_ranks())
    adapter = str(tmp_path / "run" / "adapter")
    assert main(["adapter", "check", adapter]) == 1
    out, err = capsys.readouterr()
    assert "sglang: needs rank 10" in out and "vllm" not in out and "gptqmodel: needs both halves" in out
    assert err.startswith("eora-lab: ") and "--fix" in err
    assert main(["adapter", "check", adapter, "--fix", str(tmp_path / "fixed")]) == 0
    assert "at rank 16" in capsys.readouterr().out
    assert main(["adapter", "check", str(tmp_path / "fixed")]) == 0
    assert "load it alike" in capsys.readouterr().out
    torch.testing.assert_close(
        logits(in_peft(tmp_path / "fixed", bare(tmp_path / "run"))),
        logits(load_run(tmp_path / "run")[0]),
        rtol=0,
        atol=1e-5,
    )


def test_gptqmodels_ragged_adapter_is_mended(place, tmp_path):
    """It leaves alpha_pattern out and means a scaling of 1: peft makes it something else until it is mended."""
    model = make_run(tmp_path / "run", str(place / "model"), ranks=ragged_ranks())
    path = tmp_path / "run" / "adapter"
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {}}))
    right = logits(model)
    assert (logits(in_peft(path, bare(tmp_path / "run"))) - right).abs().max() > 1e-3
    assert main(["adapter", "check", str(path), "--fix", str(tmp_path / "fixed")]) == 0
    torch.testing.assert_close(logits(in_peft(tmp_path / "fixed", bare(tmp_path / "run"))), right, rtol=0, atol=1e-5)
    Adapters(model, {"it": path}).use("it")  # and our own loading means the same
    torch.testing.assert_close(logits(model), right, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 3},
        {"lora_alpha": 16, "use_rslora": True},
        {"rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 2}},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.*_proj": 5}},
    ],
)
def test_scalings_of_adapters_that_peft_wrote(place, settings, tmp_path):
    base = bare(place / "run")
    targets = ["q_proj", "up_proj"]
    written = peft.get_peft_model(
        base, peft.LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": targets} | settings)
    )
    torch.manual_seed(0)
    for name, parameter in written.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    written.save_pretrained(tmp_path / "by_peft")
    model = load_run(place / "run")[0]
    Adapters(model, {"it": tmp_path / "by_peft"}).use("it")
    torch.testing.assert_close(logits(model), logits(written), rtol=0, atol=1e-5)
    check = ["adapter", "check", str(tmp_path / "by_peft"), "--model", str(place / "model")]
    assert main([*check, "--fix", str(tmp_path / "fixed")]) == 0
    adapted = in_peft(tmp_path / "fixed", bare(place / "run"))
    torch.testing.assert_close(logits(adapted), logits(written), rtol=0, atol=1e-4)  # scaled factors in 16 bits


@pytest.mark.parametrize(
    "name",
    ["missing half", "unknown key", "unknown module", "A's shape", "halves' ranks", "NaN", "modules_to_save", "dora"],
)
def test_what_cannot_be_mended_is_one_line(universal, place, name, capsys):
    tensors, config, folder = universal
    BROKEN[name][0](tensors, config)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["adapter", "check", str(folder), "--fix", str(folder / "fixed")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (folder / "fixed").exists()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "not that of a LoRA adapter"),
        (lambda f: edit(f, r=0), "r in adapter_config.json must be a whole number above 0"),
        (lambda f: edit(f, lora_alpha="8"), "lora_alpha in adapter_config.json must be a number"),
        (lambda f: edit(f, r=8.5), "r in adapter_config.json must be a whole number above 0, not 8.5"),
        (lambda f: edit(f, lora_alpha=True), "lora_alpha in adapter_config.json must be a number above 0, not True"),
        (lambda f: edit(f, rank_pattern=["q_proj"]), "rank_pattern in adapter_config.json must name whole numbers"),
        (lambda f: edit(f, alpha_pattern={"q_proj": "4"}), "alpha_pattern in adapter_config.json must name numbers"),
        (lambda f: edit(f, use_rslora="true"), "use_rslora in adapter_config.json must be true or false, not 'true'"),
        (lambda f: edit(f, target_modules=5), "target_modules in adapter_config.json must be a list of names, not 5"),
        (lambda f: edit(f, base_model_name_or_path=5), "base_model_name_or_path in adapter_config.json must be text"),
        (lambda f: edit(f, rank_pattern={"q_proj": 0}), "rank_pattern in adapter_config.json must name whole numbers"),
        (lambda f: edit(f, alpha_pattern={"(q_proj": 2}), "a name that is no pattern"),
        (lambda f: edit(f, base_model_name_or_path=None), "names no base model"),
        (lambda f: edit(f, base_model_name_or_path="gone"), "--model names another"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickled weights"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "copy or download it again"),
        (lambda f: save_file({}, f / "adapter_model.safetensors"), "holds no lora_A"),
    ],
)
def test_unreadable_adapters_are_one_line(universal, capsys, harm, message):
    folder = universal[2]
    harm(folder)
    capsys.readouterr()
    assert main(["adapter", "check", str(folder), "--fix", str(folder / "fixed")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("eora-lab: ") and message in line


def edit(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


# --- several on one model ------------------------------------------------------------------------------------------


def test_switching_changes_the_path_and_nothing_else(place, tmp_path):
    run = place / "run"
    model, original = load_run(run)[0], load_original(run)
    own = logits(model)
    for name, seed in (("a", 5), ("b", 6)):
        write_adapter(
            tmp_path / name, solve_adapter(load_run(run)[0], original, tiny_tokens(seed=seed), Recipe(rank=6)), "model"
        )
    layers = [m for m in model.modules() if isinstance(m, CompensatedLinear)]
    packed = [layer.codes for layer in layers]
    adapters = Adapters(model, {"a": tmp_path / "a", "b": tmp_path / "b"})
    assert adapters.names == ("own", "a", "b") and adapters.active == "own"
    seen = {}
    for name in ("a", "b", None, "own", "b", "a"):
        adapters.use(name)
        assert adapters.active == name
        torch.testing.assert_close(logits(model), seen.setdefault(name, logits(model)), rtol=0, atol=0)
    assert torch.equal(seen["own"], own)
    torch.testing.assert_close(seen[None], logits(bare(run)), rtol=0, atol=1e-5)
    for name in ("a", "b"):
        torch.testing.assert_close(seen[name], logits(in_peft(tmp_path / name, bare(run))), rtol=0, atol=1e-5)
    assert all(layer.codes is before for layer, before in zip(layers, packed, strict=True))


def test_adapters_that_do_not_fit(place, tmp_path):
    model = load_run(place / "run")[0]
    with pytest.raises(EoraLabError, match="need a compressed model"):
        Adapters(tiny_model("llama"))
    with pytest.raises(EoraLabError, match="cannot be called 'own'"):
        Adapters(model, {"own": place / "run" / "adapter"})
    with pytest.raises(EoraLabError, match="no adapter 'c'; there are own, off"):
        Adapters(model).use("c")
    write_adapter(tmp_path / "n", {"model.layers.9.q_proj": (torch.ones(2, 64), torch.ones(64, 2))}, "model")
    with pytest.raises(EoraLabError, match=r"no compressed layer model\.layers\.9\.q_proj"):
        Adapters(model, {"c": tmp_path / "n"})
    write_adapter(tmp_path / "s", {"model.layers.0.mlp.up_proj": (torch.ones(2, 64), torch.ones(64, 2))}, "model")
    with pytest.raises(EoraLabError, match=r"up_proj is 128x64 here, 64x64 in the adapter"):
        Adapters(model, {"c": tmp_path / "s"})


# --- for a task ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["compensated", "original"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_solving_again_from_the_same_texts_gives_the_runs_own_path(kind, inputs, tmp_path):
    source = save_model(tmp_path / "model", kind)
    model, _ = load_model(source)
    compress(model, tiny_tokens(), **SMALL, rank=12, inputs=inputs, folder=tmp_path / "run")
    original = load_original(tmp_path / "run")
    before = dict(original.named_modules())
    fresh = load_run(tmp_path / "run")[0]
    Adapters(fresh).use(None)
    factors = solve_adapter(fresh, original, tiny_tokens(), Recipe(rank=12, inputs=inputs), progress=False)
    for name, (A, B) in factors.items():
        module = model.get_submodule(name)
        torch.testing.assert_close(B @ A, module.lora_B @ module.lora_A, rtol=0, atol=2e-4)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=0, atol=1e-4)
    assert dict(original.named_modules()) == before


def test_a_task_adapter_serves_its_texts_better(place):
    """Inputs of a few token ids only, unlike those that the run was calibrated on."""
    model, original = load_run(place / "run")[0], load_original(place / "run")
    task = tiny_tokens(8, seed=3) % 5 + 3
    with torch.no_grad():
        wanted = original(task).logits
        own = (model(task).logits - wanted).norm()
        solve_adapter(model, original, task, Recipe(rank=12), progress=False)
        assert (model(task).logits - wanted).norm() < 0.8 * own


def test_bad_requests_to_solve(place, tmp_path):
    model, original = load_run(place / "run")[0], load_original(place / "run")
    for message, arguments in {
        "unknown method 'eoraa'": {"method": "eoraa"},
        "unknown inputs 'both'": {"inputs": "both"},
        "rank 65 is larger than any layer allows": {"rank": 65},
    }.items():
        with pytest.raises(EoraLabError, match=message):
            solve_adapter(model, original, tiny_tokens(), Recipe(**arguments), progress=False)
    with pytest.raises(EoraLabError, match="not in the original one, or of another size"):
        solve_adapter(model, tiny_model("gemma"), tiny_tokens(), progress=False)
    save_model(tmp_path / "model", "llama")
    make_run(tmp_path / "run", str(tmp_path / "model"))
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(EoraLabError, match="no longer the model that"):
        load_original(tmp_path / "run")


# --- on the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arc(place):
    """A task adapter from the command line."""
    solve = ["adapter", "solve", str(place / "run"), str(place / "arc"), "--rank", "8"]
    assert main([*solve, *calibrated(place / "text.txt")]) == 0
    return str(place / "arc")


def test_solve_evaluate_and_generate(place, arc, capsys):
    run = str(place / "run")
    card = (place / "arc" / "README.md").read_text()
    assert f"{read_report(run).base}, SHA-256" in card and "eora, rank 8" in card and "4 sequences of 32 tokens" in card
    assert "Perplexity was not measured." in card and "\nvLLM:\n" in card
    assert main(["adapter", "check", arc]) == 0
    capsys.readouterr()
    text = ["--perplexity", str(place / "text.txt"), "--windows", "2", "--window-length", "32"]
    printed = {}
    for adapter in (None, "off", arc):
        flag = ["--adapter", adapter] if adapter else []
        assert main(["evaluate", run, *text, *flag]) == 0
        assert main(["generate", run, "The quick", "--tokens", "8", *flag]) == 0
        printed[adapter] = capsys.readouterr().out
    assert len(set(printed.values())) == 3
    model, tokenizer, _ = load_run(run)
    Adapters(model, {"arc": arc}).use("arc")
    from eora_lab import token_windows

    value = perplexity(model, token_windows(tokenizer, place / "text.txt", 2, 32))
    assert f"perplexity {value:.4f}" in printed[arc]
    assert main(["generate", str(place / "model"), "The", "--adapter", arc]) == 1
    assert "need a compressed model" in capsys.readouterr().err


def talk(monkeypatch, capsys, arguments: list[str], *lines: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    code = main(["chat", *arguments, "--tokens", "12"])
    return code, *capsys.readouterr()


def answers(out: str) -> list[str]:
    return [line for line in out.splitlines() if not line.startswith(("/", "in use", "a new", "no command"))]


def test_chat_switches_adapters_in_the_conversation(place, arc, monkeypatch, capsys):
    run = str(place / "run")
    lines = ["Hello", "/reset", "/adapter off", "Hello", "/reset", "/adapter arc", "Hello", "/reset", "/adapter own"]
    code, out, err = talk(monkeypatch, capsys, [run, "--adapter", f"arc={arc}"], *lines, "Hello", "/quit", "Hello")
    assert code == 0 and [line.partition(":")[0] for line in err.splitlines()] == ["computing in float32 on cpu"]
    first, off, again, own = answers(out)
    assert first == again and len({first, off, own}) == 3
    assert "in use: off; there are own, arc, off" in out
    code, out, _ = talk(monkeypatch, capsys, [run], "Hello")  # the end of the input ends it, too
    assert code == 0 and answers(out) == [own]


def test_chat_remembers_until_reset(place, monkeypatch, capsys):
    run = str(place / "run")
    _, out, _ = talk(monkeypatch, capsys, [run], "Hello", "Well", "/reset", "Well", "/reset", "Hello")
    hello, well_after_hello, well, hello_again = answers(out)
    assert hello == hello_again and well != well_after_hello


def test_chat_commands_and_errors(place, monkeypatch, capsys, tmp_path):
    model, run = str(place / "model"), str(place / "run")
    code, out, err = talk(monkeypatch, capsys, [model], "/help", "/fly", "/adapter arc", "", "x" * 200, "Hi")
    assert code == 0 and "/reset" in out and "no command /fly" in out and "not compressed" in out
    assert "model's context of 128" in err and "Traceback" not in err
    _, _, err = talk(monkeypatch, capsys, [run], "/adapter nothing")
    assert "no adapter 'nothing'; there are own, off" in err
    save_model(tmp_path / "plain", "llama", template=None)
    for arguments, message in (
        ([str(tmp_path / "plain")], "no chat template"),
        ([run, "--adapter", "arc"], "write NAME=FOLDER"),
        ([model, "--adapter", "arc=x"], "need a compressed model"),
        ([run, "--adapter", "arc=nowhere"], "nowhere: no adapter"),
    ):
        code, _, err = talk(monkeypatch, capsys, arguments, "Hi")
        (line,) = [line for line in err.splitlines() if line.startswith("eora-lab: ")]
        assert code == 1 and message in line
