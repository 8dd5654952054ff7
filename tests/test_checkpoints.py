"""Model folders out and in: GPTQ checkpoints and dense exports of runs, and what a checkpoint's compensation gives."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from eora_lab import EoraLabError, load_model, load_run
from eora_lab.cli import main
from eora_lab.compress import GridWeight, rtn
from eora_lab.formats.dense import write_dense
from eora_lab.formats.gptq_checkpoint import GptqCheckpoint, write_checkpoint
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.model.load import load_model as load_dense
from tests.tiny import CONFIGS, compress, edit_json, save_tiny, tiny_model, tiny_tokens

GRID = {"group_size": 32, "zero_point": "integer", "scale_dtype": "float16"}
PASS = {"rank": 8, "inputs": "original", "progress": False}
EXPORTS = [
    ("llama", "gptq", {"bits": 4, "sym": True}),
    ("qwen2", "gptq_v2", {"bits": 3, "sym": False}),
    ("gemma", "gptq_v2", {"bits": 8, "sym": False}),
]


def logits(model, dtype=torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model.to(dtype)(tiny_tokens(2, seed=1)).logits


def modules_of(model) -> dict[str, CompensatedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, CompensatedLinear)}


def make_checkpoint(original, folder, checkpoint_format="gptq", dtype=torch.float32, **grid):
    """Quantise and export; returns the quantised model."""
    model, tokenizer = load_model(original)
    settings = PASS | GRID | {"bits": 4, "sym": True, "method": "none", "rank": 0} | grid
    compress(model, tiny_tokens(), "gptq", **settings)
    write_checkpoint(folder, model, tokenizer, dtype, checkpoint_format)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a Llama in `model`, and in `gptq` a checkpoint of it: 4 bits, symmetric."""
    folder = tmp_path_factory.mktemp("exported")
    make_checkpoint(save_tiny(folder / "model"), folder / "gptq")
    return folder


@pytest.fixture
def original(exported, tmp_path):
    """The model of `exported`, in a copy of the folder that a test may change."""
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model"


@pytest.mark.parametrize(("kind", "checkpoint_format", "grid"), EXPORTS)
def test_a_checkpoint_of_a_run_compensates_like_the_run(kind, checkpoint_format, grid, tmp_path):
    """Quantise, export, read, compensate: the same codes, and the same model as in one pass."""
    original = save_tiny(tmp_path / "model", kind)
    quantised = make_checkpoint(original, tmp_path / "gptq", checkpoint_format, **grid)
    checkpoint = GptqCheckpoint(tmp_path / "gptq")
    assert checkpoint.config.checkpoint_format == checkpoint_format and checkpoint.config.bits == grid["bits"]
    for name, module in modules_of(quantised).items():
        assert torch.equal(checkpoint[name].codes, module.compressed.codes)
        assert torch.equal(checkpoint[name].dense(), module.compressed.dense())
    alone, _ = load_model(original)
    checkpoint.check_model(alone)
    compress(alone, tiny_tokens(), weights=checkpoint, **PASS | {"method": "none", "rank": 0})
    assert torch.equal(logits(alone), logits(quantised))

    in_one, in_two = load_model(original)[0], load_model(original)[0]
    first = compress(in_one, tiny_tokens(), "gptq", **PASS | GRID | grid)
    second = compress(in_two, tiny_tokens(), weights=checkpoint, **PASS, folder=tmp_path / "run")
    assert torch.equal(logits(in_two), logits(in_one))
    assert [layer.error_after for layer in second.layers] == [layer.error_after for layer in first.layers]
    assert all(layer.error_after < layer.error_before for layer in second.layers)
    assert torch.equal(logits(load_run(tmp_path / "run")[0]), logits(in_two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_not_quantised_stays_what_it_was(kind, dtype, tmp_path):
    make_checkpoint(save_tiny(tmp_path / "model", kind), tmp_path / "gptq", dtype=dtype)
    before = {key: t.to(dtype) for key, t in load_file(tmp_path / "model" / "model.safetensors").items()}
    after = load_file(tmp_path / "gptq" / "model.safetensors")
    dense = {key for key in before if not key.endswith("_proj.weight")}
    assert dense == {key for key in after if key.rsplit(".", 1)[-1] not in ("qweight", "qzeros", "scales", "g_idx")}
    assert all(torch.equal(after[key], before[key]) for key in dense)
    assert ("lm_head.weight" in after) == (kind != "gemma")  # gemma's is tied
    config, old = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("gptq", "model"))
    quantize_config = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert config.pop("quantization_config") == quantize_config
    assert quantize_config["quant_method"] == "gptq" and quantize_config["group_size"] == 32
    assert config.pop("dtype") == str(dtype)[6:]
    assert config == {key: value for key, value in old.items() if key != "dtype"}
    tokenizers = [transformers.AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("gptq", "model")]
    assert len({str(tokenizer("The quick fox.").input_ids) for tokenizer in tokenizers}) == 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_dense_exports_load_as_models(kind, tmp_path):
    original = save_tiny(tmp_path / "model", kind)
    model, tokenizer = load_model(original)
    compress(model, tiny_tokens(), "gptq", bits=3, group_size=32, **PASS)
    merged, plain, half = tmp_path / "merged", tmp_path / "plain", tmp_path / "half"
    write_dense(merged, model, tokenizer, torch.float32, merge=True)
    write_dense(plain, model, tokenizer, torch.float32)
    write_dense(half, model, tokenizer)
    loaded, tokens = load_dense(merged)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert tokens("The fox").input_ids == tokenizer("The fox").input_ids
    without, _ = load_dense(plain)
    for name, module in modules_of(model).items():
        assert torch.equal(without.get_submodule(name).weight, module.compressed.dense())
    assert torch.equal(load_dense(half)[0].lm_head.weight, without.lm_head.weight.half().float())
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == (kind == "gemma") == ("lm_head.weight" not in load_file(plain / "model.safetensors"))


def test_zeros_of_a_pruned_weight_stay_zeros(original, tmp_path):
    """2:4, as masked weights on a grid with whole zero points."""
    model, tokenizer = load_model(original)
    weights = {}
    for name, linear in model.named_modules():
        if name.endswith("_proj"):
            keep = linear.weight.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1) >= 2
            weights[name] = rtn(linear.weight * keep.flatten(1), None, bits=4, **GRID)
    compress(model, tiny_tokens(), weights=weights, **PASS)
    write_dense(tmp_path / "dense", model, tokenizer)
    write_checkpoint(tmp_path / "v2", model, tokenizer, checkpoint_format="gptq_v2")
    for name in weights:
        dense = load_file(tmp_path / "dense" / "model.safetensors")[f"{name}.weight"]
        assert ((dense.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
        assert torch.equal(GptqCheckpoint(tmp_path / "v2")[name].dense().half(), dense)


def shuffled(weight: torch.Tensor) -> GridWeight:
    """Rounded to nearest in groups that take channels from all over, as with desc_act."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    rounded, back = rtn(weight[:, order], None, bits=4, sym=True, **GRID), order.argsort()
    return replace(rounded, codes=rounded.codes[:, back], g_idx=(back // 32).to(torch.int32))


def edit_both(folder, **changes) -> None:
    """Change what a checkpoint says of itself, wherever it says so."""
    edit_json(folder / "quantize_config.json", **changes)
    quantization = json.loads((folder / "quantize_config.json").read_text())
    edit_json(folder / "config.json", quantization_config=quantization)


def test_act_order_survives_run_folder_and_export(original, tmp_path):
    model, tokenizer = load_model(original)
    weights = {name: shuffled(m.weight) for name, m in model.named_modules() if name.endswith("_proj")}
    compress(model, tiny_tokens(), weights=weights, **PASS)
    write_checkpoint(tmp_path / "shuffled", model, tokenizer, torch.float32)
    checkpoint = GptqCheckpoint(tmp_path / "shuffled")
    assert all(torch.equal(checkpoint[name].dense(), weights[name].dense()) for name in weights)
    model, tokenizer = load_model(original)
    report = compress(model, tiny_tokens(), weights=checkpoint, **PASS, folder=tmp_path / "run")
    assert modules_of(model)["model.layers.0.mlp.up_proj"].compressed.g_idx is not None
    assert torch.equal(logits(load_run(tmp_path / "run")[0]), logits(model))
    on_disk = sum(f.stat().st_size for f in (tmp_path / "run/blocks").iterdir())
    assert report.nbytes < on_disk < report.nbytes + 24_000  # headers, and the report of 14 layers
    config = write_checkpoint(tmp_path / "again", model, tokenizer)
    assert config.desc_act and config.group_size == 32
    again = GptqCheckpoint(tmp_path / "again")
    assert all(torch.equal(again[name].dense(), checkpoint[name].dense()) for name in checkpoint)


def split(folder) -> None:
    """One file to three shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({key: tensors[key] for key in names if names[key] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def rename(folder) -> None:
    """A file name of older tools, and no config.json."""
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    (folder / "config.json").unlink()


@pytest.mark.parametrize("change", [split, rename, lambda folder: (folder / "quantize_config.json").unlink()])
def test_other_layouts_of_the_folder(change, original, tmp_path):
    before = dict(GptqCheckpoint(tmp_path / "gptq"))
    change(tmp_path / "gptq")
    after = GptqCheckpoint(tmp_path / "gptq")
    assert set(after) == set(before) and len(after) == 14
    assert all(torch.equal(after[name].dense(), before[name].dense()) for name in before)
    after.check_model(load_model(original)[0])


def test_linears_that_the_checkpoint_left_dense_stay_dense(original, tmp_path):
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    tensors = {key: t for key, t in tensors.items() if not key.startswith(name)}
    model, _ = load_model(original)
    save_file(tensors, tmp_path / "gptq" / "model.safetensors")
    with pytest.raises(EoraLabError, match=rf"lacks the tensor {name}\.weight"):
        GptqCheckpoint(tmp_path / "gptq").check_model(model)
    tensors[f"{name}.weight"] = model.get_submodule(name).weight.half()
    save_file(tensors, tmp_path / "gptq" / "model.safetensors")
    checkpoint = GptqCheckpoint(tmp_path / "gptq")
    checkpoint.check_model(model)
    report = compress(model, tiny_tokens(), weights=checkpoint, **PASS)
    assert len(report.layers) == 13 and isinstance(model.get_submodule(name), torch.nn.Linear)


def test_a_bias_that_the_model_lacks_may_only_be_zero(original, tmp_path):
    path = tmp_path / "gptq" / "model.safetensors"
    tensors = load_file(path)
    for value in (0.0, 1.0):
        save_file(tensors | {f"{Q_PROJ}.bias": torch.full((64,), value)}, path)
        checkpoint = GptqCheckpoint(tmp_path / "gptq")
        if value == 0:
            checkpoint.check_model(load_model(original)[0])
        else:
            with pytest.raises(EoraLabError, match=rf"the model has no {Q_PROJ}\.bias"):
                checkpoint.check_model(load_model(original)[0])


def test_a_compensation_resumes_and_knows_its_checkpoint(original, tmp_path):
    make_checkpoint(original, tmp_path / "other", bits=8)
    checkpoint = GptqCheckpoint(tmp_path / "gptq")
    whole, _ = load_model(original)
    compress(whole, tiny_tokens(), weights=checkpoint, **PASS, folder=tmp_path / "run")
    (tmp_path / "run/report.json").unlink()
    (tmp_path / "run/blocks/001.safetensors").unlink()
    resumed, _ = load_model(original)
    compress(resumed, tiny_tokens(), weights=checkpoint, **PASS, folder=tmp_path / "run")
    assert torch.equal(logits(resumed), logits(whole))
    with pytest.raises(EoraLabError, match=r"holds another run \(base was .GPTQ 4-bit g32., now .GPTQ 8-bit g32."):
        other = GptqCheckpoint(tmp_path / "other")
        compress(load_model(original)[0], tiny_tokens(), weights=other, **PASS, folder=tmp_path / "run")


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def drop(folder, key) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors")


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors is missing or damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "has no safetensors weights"),
        (lambda f: (split(f), (f / "model-00002-of-00003.safetensors").unlink()), "00002-of-00003.* is missing or"),
        (
            lambda f: (split(f), shutil.copy(*[f / f"model-0000{i}-of-00003.safetensors" for i in (1, 2)])),
            "lacks the t",
        ),
        (lambda f: (split(f), edit_json(f / "model.safetensors.index.json", weight_map=[])), "has no weight_map"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda f: (f / "quantize_config.json").write_text("[1]"), "its content must be names with values"),
        (
            lambda f: edit_both(f, bits=3),
            r"qweight .*: the checkpoint is damaged, or",
        ),
        (
            lambda f: edit_json(f / "quantize_config.json", bits=3),
            "bits is 3 in quantize_config.json and 4 in co",
        ),
        (lambda f: edit_json(f / "config.json", quantization_config="gptq"), "quantization_config in .* must be an ob"),
        (
            lambda f: (split(f), edit_json(f / "model.safetensors.index.json", weight_map={Q_PROJ: None})),
            f"weight_map must name a file for {Q_PROJ}, not None",
        ),
        (lambda f: edit_both(f, checkpoint_format="gptq_v2", format="gptq_v2"), "set it to gptq in the configuration"),
        (lambda f: edit_both(f, checkpoint_format="exl2", format="exl2"), "'exl2' is not read"),
        (lambda f: drop(f, f"{Q_PROJ}.scales"), rf"lacks {Q_PROJ}\.scales"),
        (lambda f: drop(f, f"{Q_PROJ}.qweight"), rf"lacks the tensor {Q_PROJ}\.weight"),
        (lambda f: drop(f, "model.norm.weight"), r"lacks the tensor model\.norm\.weight of .*model"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line(damage, message, original, tmp_path, capsys, monkeypatch):
    damage(tmp_path / "gptq")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    monkeypatch.chdir(tmp_path)
    assert main(["mend", "gptq", "run", "--model", "model", "--rank", "8", *TEXTS]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eora-lab: ")]
    assert re.search(message, line), line
    assert not (tmp_path / "run" / "blocks").exists()


TEXTS = (
    "--calibration.source text.txt --calibration.nsamples 4 --calibration.seqlen 32 --evaluation.perplexity text.txt"
)
TEXTS = f"{TEXTS} --evaluation.windows 2 --evaluation.window-length 32".split()


def resized(**changes):
    """A tiny Llama of other sizes."""
    config = tiny_model("llama").config
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return type(tiny_model("llama"))(config).eval()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model("qwen2"), "its model_type is llama, that of the model qwen2"),
        (lambda: resized(vocab_size=98), "its vocab_size is 97, that of the model 98"),
        (lambda: resized(num_hidden_layers=3), "its num_hidden_layers is 2, that of the model 3"),
        (lambda: resized(num_hidden_layers=1), "its num_hidden_layers is 2, that of the model 1"),
        (lambda: resized(intermediate_size=192), "its intermediate_size is 128, that of the model 192"),
        (lambda: tiny_model("llama", seed=1), r"the values of model\.embed_tokens\.weight differ"),
    ],
)
def test_another_model_is_told_by_its_sizes_and_dense_tensors(model, message, original, tmp_path):
    with pytest.raises(EoraLabError, match=message):
        GptqCheckpoint(tmp_path / "gptq").check_model(model())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: resized(num_hidden_layers=1), r"quantises model\.layers\.1\.\S+, which is no linear layer"),
        (lambda: resized(num_hidden_layers=3), r"lacks the tensor model\.layers\.2\.self_attn\.q_proj\.weight"),
        (lambda: resized(vocab_size=98), r"embed_tokens\.weight is \(97, 64\), in the model \(98, 64\)"),
    ],
)
def test_the_same_without_a_config(model, message, original, tmp_path):
    (tmp_path / "gptq" / "config.json").unlink()
    with pytest.raises(EoraLabError, match=message):
        GptqCheckpoint(tmp_path / "gptq").check_model(model())


def test_weights_of_another_model_are_told_by_their_distance(original, tmp_path):
    make_checkpoint(original, tmp_path / "two", bits=2)
    checkpoint = GptqCheckpoint(tmp_path / "two")
    model, _ = load_model(original)
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.o_proj").weight.copy_(
            tiny_model("llama", seed=1).lm_head.weight[:64]
        )
    before = logits(model)
    checkpoint.check_model(model)  # nothing but this layer's weight differs
    with pytest.raises(EoraLabError, match=r"layers\.1\.self_attn\.o_proj comes compressed, but 1\.\d+ times"):
        compress(model, tiny_tokens(), weights=checkpoint, **PASS)
    assert torch.equal(logits(model), before)
    wider = {name: checkpoint["model.layers.0.mlp.up_proj"] for name in ("model.layers.0.mlp.down_proj",)}
    with pytest.raises(EoraLabError, match=r"compressed as \(128, 64\), but is \(64, 128\) in this model"):
        compress(model, tiny_tokens(), weights=wider, **PASS)
    with pytest.raises(EoraLabError, match="lm_head comes compressed, but is no linear in the decoder blocks"):
        compress(model, tiny_tokens(), weights={"lm_head": checkpoint[Q_PROJ]}, **PASS)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_one_step_off_are_told_by_their_distance(bits, original, tmp_path):
    """Asymmetric zero points in the wrong format, which nothing in the file contradicts."""
    make_checkpoint(original, tmp_path / "right", "gptq_v2", bits=bits, sym=False)
    compress(load_model(original)[0], tiny_tokens(), weights=GptqCheckpoint(tmp_path / "right"), **PASS)
    edit_both(tmp_path / "right", checkpoint_format="gptq", format="gptq")
    with pytest.raises(
        EoraLabError, match=r"comes compressed, but [+-][01]\.\d\d steps of its grid .*checkpoint_format"
    ):
        compress(load_model(original)[0], tiny_tokens(), weights=GptqCheckpoint(tmp_path / "right"), **PASS)


def test_another_layer_of_four_bits_is_told_by_the_steps_of_its_grid(original, tmp_path):
    """Half of another layer mixed in: nearer than zero is, and still far more than rounding explains."""
    checkpoint, (model, _) = GptqCheckpoint(tmp_path / "gptq"), load_model(original)
    with torch.no_grad():
        weight, other = (model.get_submodule(name).weight for name in (Q_PROJ, Q_PROJ.replace("0", "1")))
        weight.add_(0.7 * other)
    with pytest.raises(EoraLabError, match=r"q_proj comes compressed, but 0\.\d\d times .* \d\.\d steps of its grid"):
        compress(model, tiny_tokens(), weights=checkpoint, **PASS)


def test_folders_that_are_no_checkpoint(original, tmp_path):
    with pytest.raises(EoraLabError, match=r"neither quantize_config.* nor a quantization_config"):
        GptqCheckpoint(original)
    with pytest.raises(EoraLabError, match="is no GPTQ checkpoint"):
        GptqCheckpoint(tmp_path / "absent")
    (original / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    with pytest.raises(EoraLabError, match="no tensor in it is named qweight"):
        GptqCheckpoint(original)


def test_exports_that_are_refused_leave_nothing_behind(original, tmp_path):
    model, tokenizer = load_model(original)
    with pytest.raises(EoraLabError, match="this model is not compressed"):
        write_checkpoint(tmp_path / "out", model, tokenizer)
    compress(model, tiny_tokens(), bits=4, group_size=32, **PASS)
    with pytest.raises(EoraLabError, match="--zero-point integer --scale-dtype float16"):
        write_checkpoint(tmp_path / "out", model, tokenizer)
    with pytest.raises(EoraLabError, match="model is not an empty folder: choose another"):
        write_dense(original, model, tokenizer)
    model.model.norm.weight.data[0] = 1e6
    with pytest.raises(EoraLabError, match=r"model\.norm\.weight does not fit float16: use bfloat16 or float32"):
        write_dense(tmp_path / "out", model, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "gptq"}
    write_dense(tmp_path / "out", model, tokenizer, torch.bfloat16)


def test_an_output_that_is_taken_is_named_before_anything_is_loaded(original, tmp_path, capsys):
    assert main(["export", str(tmp_path / "no_run"), str(original)]) == 1
    assert "model is not an empty folder: choose another" in capsys.readouterr().err


def test_an_empty_folder_may_be_a_link(original, tmp_path):
    model, tokenizer = load_model(original)
    compress(model, tiny_tokens(), bits=4, group_size=32, **PASS)
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place", target_is_directory=True)
    write_dense(tmp_path / "link", model, tokenizer)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "place" / "config.json").exists()


def test_layers_of_several_grids_are_refused(original, tmp_path):
    model, tokenizer = load_model(original)
    linears = {name: m for name, m in model.named_modules() if name.endswith("_proj")}
    weights = {name: rtn(m.weight, None, bits=4 if "mlp" in name else 8, **GRID) for name, m in linears.items()}
    compress(model, tiny_tokens(), weights=weights, **PASS)
    with pytest.raises(EoraLabError, match=r"q_proj has \(8, 32\) and \S+gate_proj \(4, 32\)"):
        write_checkpoint(tmp_path / "out", model, tokenizer, checkpoint_format="gptq_v2")


def test_compress_export_mend_on_the_command_line(original, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    grid = ["--group-size", "32", "--sym", "--zero-point", "integer", "--scale-dtype", "float16"]
    assert main(["compress", "run", "--model", "model", *grid, "--rank", "8", "--inputs", "original", *TEXTS]) == 0
    assert main(["export", "run", "v1"]) == 0
    assert "gptq, 4 bits, groups of 32, sym=True, desc_act=False" in capsys.readouterr().out
    assert main(["export", "run", "gptq", "--format", "gptq_v2"]) == 1
    assert "gptq is not an empty folder" in capsys.readouterr().err
    assert main(["export", "run", "v2", "--format", "gguff"]) == 1
    assert "unknown format 'gguff'" in capsys.readouterr().err
    assert main(["export", "run", "v2", "--format", "gguf"]) == 1
    assert "cannot write v2: the name must end in .gguf" in capsys.readouterr().err
    assert main(["export", "run", "v2.gguf", "--format", "gguf"]) == 1
    assert "run did not mend a file: name one of the same model (--like)" in capsys.readouterr().err
    assert main(["export", "run", "dense", "--format", "merged", "--dtype", "float32"]) == 0
    arguments = ["mend", "v1", "again", "--model", "model", "--rank", "8", "--inputs", "original", *TEXTS]
    assert main(arguments) == 0
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in ("run", "again")]
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
    settings = json.loads((tmp_path / "again" / "config.json").read_text())["settings"]
    assert settings["base"] == "GPTQ 4-bit g32" and settings["checkpoint"] == str(tmp_path / "v1")
    assert settings["checkpoint_sha256"] == GptqCheckpoint(tmp_path / "v1").sha256() and "bits" not in settings
    assert reports[1]["base"] == "GPTQ 4-bit g32" and reports[0]["base"] == "gptq 4-bit g32"
    merged, run = load_dense("dense")[0], load_run("again")[0]
    torch.testing.assert_close(logits(merged), logits(run), rtol=1e-4, atol=1e-5)
    arguments[2] = "budget"
    assert main([*arguments, "--budget.objective", "relative"]) == 0
    assert (
        json.loads((tmp_path / "budget" / "config.json").read_text())["settings"]["budget"]["objective"] == "relative"
    )
    ranks = json.loads((tmp_path / "budget" / "ranks.json").read_text())
    assert len(ranks) == 14 and len(set(ranks.values())) > 1
