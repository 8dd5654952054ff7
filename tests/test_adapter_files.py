"""Adapters as files: what they mean, which weights they belong to, and where they may be written."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from eora_lab import EoraLabError, load_model, load_run
from eora_lab.cli import main
from eora_lab.formats import adapter_config
from eora_lab.formats.adapter_check import check_adapter
from eora_lab.formats.adapter_config import left_out_by
from eora_lab.formats.peft import in_half, read_adapter, read_files, write_adapter
from eora_lab.run.adapters import Adapters, use_only
from tests.tiny import TEXT, compress, logits, save_tiny, tiny_model, tiny_tokens

Q = "model.layers.0.self_attn.q_proj"
TOKENS = tiny_tokens(2, seed=9)


def make_run(folder: Path, model: Path, **changes) -> Path:
    settings = {"bits": 2, "group_size": 32, "rank": 12, "inputs": "original", "progress": False} | changes
    compress(load_model(model)[0], tiny_tokens(), **settings, folder=folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`model` and runs of it in 2 and 4 bits, `two` and `four`; another model of the same sizes, `other`."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model")
    save_tiny(folder / "other", seed=5)
    (folder / "text.txt").write_text(TEXT)
    make_run(folder / "two", folder / "model")
    make_run(folder / "four", folder / "model", bits=4)
    return folder


@pytest.fixture
def adapter(place, tmp_path):
    """A universal adapter of `two`, to change."""
    assert main(["adapter", "export", str(place / "two"), str(tmp_path / "universal"), "--universal"]) == 0
    return tmp_path / "universal"


@pytest.fixture
def foreign(adapter):
    """The same as another tool would write it, which does not say what it belongs to."""
    rewrite(adapter, lambda key: key)
    return adapter


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, name, change=lambda tensor: tensor, more: dict | None = None) -> None:
    """Tensors under other names, and changed."""
    path = folder / "adapter_model.safetensors"
    save_file({name(key): change(tensor) for key, tensor in load_file(path).items()} | (more or {}), path)


def shapes() -> dict[str, tuple[int, int]]:
    return {n: tuple(m.weight.shape) for n, m in tiny_model("llama").named_modules() if n.endswith("_proj")}


def error(capsys) -> str:
    """The one line on stderr."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eora-lab: ")]
    return line


# --- what the factors mean -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            ({"init_lora_weights": start}, f"init_lora_weights '{start}' may change the weights beside")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "new")
        ),
        ({"init_lora_weights": "loftq"}, "goes with weights that LoftQ changed"),
        ({"use_dora": True}, "uses DoRA"),
        ({"lora_bias": True}, r"uses a bias of lora_B \(lora_bias\)"),
        ({"trainable_token_indices": [1]}, r"\(trainable_token_indices\)"),
        ({"target_parameters": ["mlp.experts.up"]}, r"\(target_parameters\)"),
        ({"layer_replication": [[0, 1]]}, r"\(layer_replication\)"),
        ({"alora_invocation_tokens": [5]}, r"\(alora_invocation_tokens\)"),
        ({"use_qalora": True}, r"\(use_qalora\)"),
        ({"use_bdlora": {"nblocks": 2}}, r"\(use_bdlora\)"),
        ({"arrow_config": {"top_k": 3}}, r"\(arrow_config\)"),
        ({"kasa_config": {"beta": 1}}, r"\(kasa_config\)"),
        ({"megatron_config": {"tensor_model_parallel_size": 2}}, r"\(megatron_config\)"),
        ({"twice": True}, r"twice \(True\) in adapter_config.json is not known here"),
    ],
)
def test_adapters_that_are_more_than_a_product_are_refused_by_name(change, words, adapter):
    edit(adapter, **change)
    with pytest.raises(EoraLabError, match=words):
        read_adapter(adapter)
    assert any(finding.loader == "any" for finding in check_adapter(*read_files(adapter), shapes()))


@pytest.mark.parametrize(
    ("change", "words", "found"),
    [
        (
            {"layers_to_transform": 0},
            r"layers\.1\..* has factors, and layers_to_transform in .* leaves it out",
            "ignores",
        ),
        ({"target_modules": ["q_proj"]}, "down_proj has factors, and target_modules in .* leaves it out", "ignores"),
        ({"target_modules": []}, "has factors, and target_modules in .* leaves it out", "ignores"),
        ({"exclude_modules": ".*mlp.*"}, "mlp.* has factors, and exclude_modules in .* leaves it out", "ignores"),
        ({"exclude_modules": "(mlp"}, r"exclude_modules in .* has a name that is no pattern \(missing \)", None),
        ({"layers_to_transform": ["0"]}, "layers_to_transform in .* must be numbers of layers", None),
        ({"r": 32, "lora_alpha": 32}, "its rank is 16, and 32 by r and rank_pattern", "refuses"),
    ],
)
def test_a_configuration_that_contradicts_the_factors_is_refused(change, words, found, adapter):
    tensors, _ = read_files(adapter)
    edit(adapter, **change)
    with pytest.raises(EoraLabError, match=words):
        read_adapter(adapter)
    if found:
        findings = check_adapter(tensors, json.loads((adapter / "adapter_config.json").read_text()), shapes())
        assert any(finding.loader == "peft" and found in finding.problem for finding in findings)


NAMES = ("q_proj", "mlp.down_proj", "layers.1.mlp", "proj", "model.layers.0.self_attn.q_proj", "experts.0.up_proj")
SETS = st.one_of(st.none(), st.lists(st.sampled_from(NAMES), max_size=3), st.sampled_from((".*q_proj", ".*mlp.*", "")))
MODULES = (
    *(f"model.layers.{n}.{leaf}" for n in (0, 1, 11) for leaf in ("self_attn.q_proj", "mlp.down_proj")),
    *("model.layers.1.mlp.experts.0.up_proj", "layers.0.mlp.up_proj", "h.1.attn.q_proj", "q_proj"),
)


@given(
    SETS.filter(lambda names: names is not None),
    SETS,
    st.one_of(st.none(), st.integers(0, 1), st.lists(st.integers(0, 11), max_size=2)),
    st.sampled_from((None, [], "layers", ["h", "layers"], "experts")),
)
def test_layers_are_left_out_where_peft_leaves_them_out(target, exclude, layers, pattern):
    settings = {"target_modules": target, "exclude_modules": exclude, "layers_to_transform": layers}
    config = SimpleNamespace(**settings, layers_pattern=pattern, modules_to_save=None, target_parameters=None)
    for module in MODULES:
        given_factors = bool(check_target_module_exists(config, module))
        assert (left_out_by(settings | {"layers_pattern": pattern}, module) is None) == given_factors


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_weights_alone_are_plain(start, adapter):
    edit(adapter, init_lora_weights=start, new_kind=None, another=False)
    assert read_adapter(adapter)[0].keys() == shapes().keys()
    assert check_adapter(*read_files(adapter), shapes()) == []


def test_every_key_of_peft_is_known():
    known = adapter_config.PLAIN | adapter_config.MORE.keys() | {"init_lora_weights"}
    assert {field.name for field in fields(peft.LoraConfig)} <= known
    config = peft.LoraConfig(r=4, target_modules=["q_proj"]).to_dict()
    assert list(adapter_config.not_plain(config)) == []


def test_peft_s_pissa_is_refused(place, tmp_path):
    """Reproduced from a report: such factors used as plain LoRA are off by 80 % of the logits."""
    model = peft.get_peft_model(
        load_model(place / "model")[0],
        peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "pissa")
    with pytest.raises(EoraLabError, match="init_lora_weights 'pissa'"):
        use_only(load_run(place / "two")[0], tmp_path / "pissa")


@pytest.mark.parametrize(
    "name",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace("base_model.model.", ""),
        lambda key: key.replace("model.layers", "model.language_model.layers"),
        lambda key: key.replace("model.layers", "language_model.model.layers"),
    ],
)
def test_other_spellings_of_the_names_are_read(name, place, foreign, capsys):
    model = load_run(place / "two")[0]
    own = logits(model, TOKENS)
    rewrite(foreign, name)
    use_only(model, foreign)
    torch.testing.assert_close(logits(model, TOKENS), own, rtol=0, atol=1e-6)
    findings = [str(finding) for finding in check_adapter(*read_files(foreign), shapes())]
    assert any("another key" in text or "spelt otherwise" in text for text in findings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (
                edit(f, target_modules="all-linear"),
                rewrite(
                    f,
                    lambda key: key,
                    more={
                        "base_model.model.lm_head.lora_A.weight": torch.ones(16, 64),
                        "base_model.model.lm_head.lora_B.weight": torch.ones(97, 16),
                    },
                ),
            ),
            r"no compressed layer lm_head here: .* a layer that stays as it is",
        ),
        (
            lambda f: rewrite(
                f, lambda key: key, more={f"base_model.model.{Q}.lora_A.second.weight": torch.ones(16, 64)}
            ),
            f"lora_A of {Q} twice: save one adapter alone",
        ),
        (
            lambda f: rewrite(f, lambda key: key, lambda tensor: tensor.to(torch.float8_e4m3fn)),
            r"lora_[AB]\.weight is float8_e4m3fn, which is not read: save the adapter in float16",
        ),
    ],
)
def test_factors_that_cannot_be_used_are_one_true_line(change, message, place, foreign):
    change(foreign)
    with pytest.raises(EoraLabError, match=message):
        use_only(load_run(place / "two")[0], foreign)


# --- in 16 bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(1e-6, 1e6), (1e4, 1e-8), (1e-9, 1e9), (1e6, 1e-6)])
def test_factors_are_balanced_where_float16_needs_it(a, b):
    A, B = tiny_model("llama").lm_head.weight[:4, :], tiny_model("llama").lm_head.weight[:, :4]
    halves = in_half(A.detach() * a, B.detach() * b, Q)
    assert all(half.dtype == torch.float16 and half.isfinite().all() for half in halves)
    product = (B @ A).double() * (a * b)
    assert ((halves[1].double() @ halves[0].double()) - product).norm() < 2e-3 * product.norm()


def test_factors_that_fit_are_cast_as_they_are():
    A, B = torch.randn(4, 64) * 0.1, torch.randn(64, 4) * 3
    assert all(torch.equal(half, one.half()) for half, one in zip(in_half(A, B, Q), (A, B), strict=True))
    zeros = in_half(A, torch.zeros(64, 4), Q)  # LoRA's own start
    assert torch.equal(zeros[0], A.half()) and not zeros[1].any()


def test_a_float16_model_takes_factors_of_very_different_sizes(place):
    model = load_run(place / "two", dtype="float16")[0]
    adapters = Adapters(model)
    own = adapters.factors()
    adapters.add("scaled", {name: (A * 2.0**-20, B * 2.0**20) for name, (A, B) in own.items()})
    adapters.use("scaled")
    layer = model.get_submodule(Q)
    product = own[Q][1] @ own[Q][0]
    assert (layer.lora_B.float() @ layer.lora_A.float() - product).norm() < 2e-3 * product.norm()


@pytest.mark.parametrize("size", [1e6, 1e-7])
def test_a_product_that_does_not_survive_is_refused_by_layer(size, tmp_path):
    factors = {Q: (torch.ones(2, 64) * size, torch.ones(64, 2) * size)}
    with pytest.raises(EoraLabError, match=f"{Q}: its factors do not fit float16, B A would change by"):
        write_adapter(tmp_path / "out", factors, "model")
    assert not (tmp_path / "out").exists()


def test_fix_writes_what_was_meant(foreign, place, tmp_path):
    """Reproduced from a report: bfloat16 factors of very different sizes became Inf or zeros."""
    meant = {name: B.double() @ A.double() for name, (A, B) in read_adapter(foreign)[0].items()}
    for half, scale in (("lora_A", 2.0**-20), ("lora_B", 2.0**20)):
        path = foreign / "adapter_model.safetensors"
        tensors = {k: (t.float() * scale if half in k else t.float()) for k, t in load_file(path).items()}
        save_file(tensors, path)
    assert main(["adapter", "check", str(foreign), "--fix", str(tmp_path / "fixed")]) == 0
    for name, (A, B) in read_adapter(tmp_path / "fixed")[0].items():
        assert (B.double() @ A.double() - meant[name]).norm() <= 2e-3 * meant[name].norm()


# --- which weights it belongs to -----------------------------------------------------------------------------------


def test_an_adapter_is_used_on_its_own_weights_only(place, tmp_path, capsys):
    """Reproduced from a report: paths of another run and of another base were used without a word."""
    run, other = str(place / "two"), str(place / "four")
    texts = ["--perplexity", str(place / "text.txt"), "--windows", "2", "--window-length", "32"]
    assert main(["adapter", "export", run, str(tmp_path / "out")]) == 0
    for adapter in (str(tmp_path / "out"), f"{run}/adapter"):
        assert main(["evaluate", run, "--adapter", adapter, *texts]) == 0
        capsys.readouterr()
        for command in (["evaluate", other, *texts], ["generate", other, "The"]):
            assert main([*command, "--adapter", adapter]) == 1
            line = error(capsys)
            assert (
                adapter in line and "made for other compressed weights (of " in line and "use it with the run" in line
            )


def test_check_names_other_weights(place, tmp_path, capsys):
    adapter = str(place / "two" / "adapter")
    universal = str(tmp_path / "universal")
    assert main(["adapter", "check", adapter, "--model", str(place / "two"), "--fix", universal]) == 0
    for model in ("model", "two"):
        assert main(["adapter", "check", universal, "--model", str(place / model)]) == 0
    capsys.readouterr()
    for model, words in (("four", "was made for other compressed weights"), ("other", "of another model than")):
        check = ["adapter", "check", universal, "--model", str(place / model)]
        assert main(check) == 1
        assert words in capsys.readouterr().out
        assert main([*check, "--fix", str(tmp_path / "fixed")]) == 1
        assert words in error(capsys) and not (tmp_path / "fixed").exists()


def test_a_quantised_base_tells_the_sizes(place, foreign, tmp_path):
    """What GPTQModel's adapters name: only the sizes of its linears are needed."""
    shutil.copytree(place / "model", tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    assert main(["adapter", "check", str(foreign), "--model", str(tmp_path / "gptq")]) == 0


def test_an_adapter_of_another_tool_that_names_another_base_is_said(place, foreign, capsys):
    model = load_run(place / "two")[0]
    edit(foreign, base_model_name_or_path="somebody/llama-9")
    with pytest.warns(UserWarning, match="names somebody/llama-9 as its base model, and this is a compression of"):
        use_only(model, foreign)
    assert main(["adapter", "check", str(foreign), "--model", str(place / "model")]) == 0
    assert "names somebody/llama-9 as its base model, not" in capsys.readouterr().err


def test_a_solved_adapter_belongs_to_the_run_and_to_its_settings(place, tmp_path):
    texts = ["--calibration.source", str(place / "text.txt"), "--calibration.nsamples", "4"]
    solve = ["adapter", "solve", str(place / "two"), str(tmp_path / "arc"), "--rank", "4", *texts]
    assert main([*solve, "--calibration.seqlen", "32"]) == 0
    Adapters(load_run(place / "two")[0], {"arc": tmp_path / "arc"})
    with pytest.raises(EoraLabError, match="made for other compressed weights"):
        Adapters(load_run(place / "four")[0], {"arc": tmp_path / "arc"})
    assert main([*solve, "--calibration.seqlen", "16"]) == 1  # other work: another adapter
    assert main([*solve, "--calibration.seqlen", "32"]) == 0


# --- where it is written -------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("model", "holds a model or a run: choose another output folder"),
        ("two", "belongs to a run"),
        ("two/adapter", "belongs to a run"),
        ("four/adapter", "belongs to a run"),
        ("strange", "holds another adapter"),
        ("notes", "holds other files"),
        ("text.txt", "is a file"),
    ],
)
def test_nothing_foreign_is_overwritten(output, words, place, tmp_path, capsys):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "four" / "adapter", tmp_path / "strange")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    before, run, out = files(tmp_path), str(tmp_path / "two"), str(tmp_path / output)
    fix = ["adapter", "check", f"{run}/adapter", "--fix", out]
    for command in (["adapter", "export", run, out], ["adapter", "solve", run, out], fix):
        assert main(command) == 1
        assert words in error(capsys)
    assert files(tmp_path) == before


def test_the_same_adapter_may_be_written_again(place, tmp_path, capsys):
    run, out = str(place / "two"), str(tmp_path / "my adapter")
    for _ in range(2):
        assert main(["adapter", "export", run, out]) == 0
        assert f"try  eora-lab adapter check '{out}'" in capsys.readouterr().out
    assert main(["adapter", "export", run, out, "--universal"]) == 1
    assert "holds another adapter" in error(capsys)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "empty").mkdir()
    assert main(["adapter", "export", run, str(tmp_path / "link" / "empty")]) == 0


def test_an_export_is_the_run_s_own_path_whatever_lies_in_its_adapter_folder(place, tmp_path):
    shutil.copytree(place / "two", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.copytree(place / "four" / "adapter", tmp_path / "run" / "adapter")
    assert main(["adapter", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    ours, own = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", place / "two/adapter")
    )
    assert ours.keys() == own.keys() and all(torch.equal(ours[key], own[key]) for key in own)
