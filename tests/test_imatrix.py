"""Importance matrices of llama.cpp: read, written, and solved with, without a pass through the model."""

import struct

import gguf
import numpy as np
import pytest
import torch

from eora_lab import EoraLabError, InputStatistics, Recipe, collect_statistics, compress_model, load_model, load_run
from eora_lab.cli import main
from eora_lab.formats.imatrix import read_imatrix, write_imatrix
from eora_lab.model.load import load_skeleton
from tests.test_expert_adapters import mixture
from tests.tiny import TEXT, calibrated, save_tiny, tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a text, and an imatrix of the model from the command line."""
    folder = tmp_path_factory.mktemp("imatrix")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    files = [str(folder / "model"), str(folder / "imatrix.gguf")]
    assert main(["imatrix", *files, *calibrated(folder / "text.txt", 6)]) == 0
    return folder


def entries(path) -> dict[str, np.ndarray]:
    return {one.name: np.array(one.data) for one in gguf.GGUFReader(path).tensors}


def write_dat(path, values: dict[str, np.ndarray], chunks: int) -> None:
    """The older form, as llama-imatrix wrote it: means times chunks."""
    parts = [struct.pack("<i", len(values))]
    for name, means in values.items():
        flat = (means * chunks).astype(np.float32).ravel()
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", chunks, len(flat)), flat.tobytes()]
    path.write_bytes(b"".join(parts) + struct.pack("<ii", chunks, 4) + b"text")


def test_the_file_is_that_of_llama_imatrix(place):
    """Keys and tensors as tools/imatrix/imatrix.cpp writes them."""
    reader = gguf.GGUFReader(place / "imatrix.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert said == {
        "general.type": "imatrix",
        "imatrix.datasets": [str(place / "text.txt")],
        "imatrix.chunk_count": 6,
        "imatrix.chunk_size": 32,
    }
    tensors = {one.name: one for one in reader.tensors}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    stems = [f"blk.{block}.{name}.weight" for block in range(2) for name in names]
    assert tensors.keys() == {f"{stem}.{part}" for stem in stems for part in ("in_sum2", "counts")}
    for stem in stems:
        width = 128 if "ffn_down" in stem else 64
        assert list(tensors[f"{stem}.in_sum2"].shape) == [width, 1]
        assert list(tensors[f"{stem}.counts"].shape) == [1, 1]
        assert {tensors[f"{stem}.{part}"].tensor_type.name for part in ("in_sum2", "counts")} == {"F32"}
        assert tensors[f"{stem}.counts"].data.item() == 192


def test_what_is_written_is_read_back(tmp_path):
    model = tiny_model("llama")
    statistics = collect_statistics(model, tiny_tokens(), progress=False)
    assert write_imatrix(tmp_path / "i.gguf", statistics, model) == 14
    found = read_imatrix(tmp_path / "i.gguf", model)
    assert found.keys() == statistics.keys()
    for name, one in found.items():
        assert one.diagonal and one.tokens == statistics[name].tokens
        torch.testing.assert_close(one.power, statistics[name].second_moment.diagonal())
        assert torch.equal(one.metric, one.power)
    write_imatrix(tmp_path / "again.gguf", found, model)
    for name, values in entries(tmp_path / "again.gguf").items():
        np.testing.assert_allclose(values, entries(tmp_path / "i.gguf")[name], rtol=1e-6)


def test_the_older_form_is_read(tmp_path):
    model = tiny_model("llama")
    values = {"blk.0.attn_q.weight": np.arange(64) / 7, "output.weight": np.ones(64)}
    write_dat(tmp_path / "i.dat", values, chunks=3)
    (found,) = read_imatrix(tmp_path / "i.dat", model).items()
    assert found[0] == "model.layers.0.self_attn.q_proj" and found[1].tokens == 3 * 512
    torch.testing.assert_close(found[1].power, torch.arange(64) / 7)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_have_rows_of_their_own(kind, tmp_path):
    model = mixture(kind)
    statistics = collect_statistics(model, tiny_tokens(12, 64), progress=False)
    write_imatrix(tmp_path / "i.gguf", statistics, model)
    held = entries(tmp_path / "i.gguf")
    found = read_imatrix(tmp_path / "i.gguf", model)
    seen = [name for name in statistics if ".experts." in name and statistics[name].tokens >= 4]
    assert len(seen) > 8
    for name in seen:
        block, index, leaf = name.split(".")[2], int(name.split(".")[-2]), name.split(".")[-1]
        for tensor in {"down_proj": ["down"], "gate_up_proj": ["gate", "up"]}[leaf]:
            row = held[f"blk.{block}.ffn_{tensor}_exps.weight.in_sum2"][index]
            power = statistics[name].power * statistics[name].tokens
            np.testing.assert_allclose(row, power.numpy(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name].power, statistics[name].power)
    means = held["blk.0.ffn_gate_exps.weight.in_sum2"]
    counts = held["blk.0.ffn_gate_exps.weight.counts"]
    write_dat(tmp_path / "i.dat", {"blk.0.ffn_gate_exps.weight": means / np.maximum(counts, 1)}, chunks=4)
    older = read_imatrix(tmp_path / "i.dat", model)
    name = next(name for name in seen if ".0." in name and name.endswith("gate_up_proj") and name in older)
    torch.testing.assert_close(older[name].power, statistics[name].power)


def test_an_expert_without_tokens_has_the_mean_of_the_others(tmp_path):
    model = mixture("qwen3_moe")
    statistics = collect_statistics(model, tiny_tokens(), progress=False)
    name = "model.layers.0.mlp.experts.1.down_proj"
    empty = InputStatistics.from_power(torch.zeros(statistics[name].in_features), 0)
    write_imatrix(tmp_path / "i.gguf", statistics | {name: empty}, model)
    found = read_imatrix(tmp_path / "i.gguf", model)
    siblings = [n for n in statistics if n.startswith("model.layers.0.mlp.experts.") and n.endswith("down_proj")]
    others = [statistics[sibling] for sibling in siblings if sibling != name]
    mean = sum(one.power * one.tokens for one in others) / sum(one.tokens for one in others)
    torch.testing.assert_close(found[name].power, mean)
    assert found[name].tokens == 0 and found[name].pooled_tokens > 0
    assert found[name].or_identity(False) is found[name]


def test_qera_approx_needs_no_more_than_the_diagonal(tmp_path):
    model, tokens = tiny_model("llama"), tiny_tokens()
    statistics = collect_statistics(model, tokens, progress=False)
    write_imatrix(tmp_path / "i.gguf", statistics, model)
    recipe = Recipe("rtn", bits=3, group_size=32, method="qera_approx", rank=8, inputs="original")
    ours, theirs = tiny_model("llama"), tiny_model("llama")
    compress_model(ours, tokens, recipe, statistics=statistics, progress=False)
    report = compress_model(
        theirs,
        None,
        recipe,
        statistics=read_imatrix(tmp_path / "i.gguf", theirs),
        folder=tmp_path / "run",
        progress=False,
    )
    for name in statistics:
        mine, its = (one.get_submodule(name) for one in (ours, theirs))
        assert torch.equal(mine.compressed.dense(), its.compressed.dense())
        torch.testing.assert_close(mine.lora_B @ mine.lora_A, its.lora_B @ its.lora_A, rtol=0, atol=1e-5)
    assert all(layer.diagonal and layer.error_after < layer.error_before for layer in report.layers)
    assert "only mean squares were known" in str(report)


def test_no_text_runs_through_the_model(tmp_path):
    """The only modules that run are none at all."""
    model = tiny_model("llama")
    write_imatrix(tmp_path / "i.gguf", collect_statistics(model, tiny_tokens(), progress=False), model)
    ran = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
    recipe = Recipe("rtn", group_size=32, method="act_s", rank=4, inputs="original")
    found = read_imatrix(tmp_path / "i.gguf", load_skeleton_of(model, tmp_path))
    compress_model(model, None, recipe, statistics=found, progress=False)
    assert not ran


def load_skeleton_of(model, folder):
    model.save_pretrained(folder / "model")
    return load_skeleton(folder / "model")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "eora"}, "rtn and eora: only E[x²] of every input channel is known"),
        ({"method": "eora_paper"}, "rtn and eora_paper: only E[x²]"),
        ({"compressor": "gptq", "method": "svd"}, "gptq and svd: only E[x²]"),
        ({"compressor": "sparsegpt", "sparsity": "2:4", "method": "svd"}, "sparsegpt and svd: only E[x²]"),
        ({"method": "qera_approx", "factor_bits": 4}, "rtn and qera_approx: only E[x²]"),
        ({"method": "qera_approx", "held_out": 0.25}, "no tokens were held out"),
    ],
)
def test_what_needs_more_is_refused(settings, words, tmp_path):
    model = tiny_model("llama")
    found = {name: InputStatistics.from_power(torch.ones(m.in_features), 99)
             for name, m in model.named_modules() if name.endswith("_proj")}  # fmt: skip
    recipe = Recipe(**{"compressor": "rtn", "group_size": 32, "rank": 4, "inputs": "original"} | settings)
    with pytest.raises(EoraLabError, match=r"^" + words.replace("[", r"\[").replace("]", r"\]")):
        compress_model(model, None, recipe, statistics=found, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    assert all(type(m) is torch.nn.Linear for n, m in model.named_modules() if n in found)


@pytest.mark.parametrize("compressor", ["wanda", "magnitude", "rtn"])
def test_compressors_that_look_at_channels_alone(compressor):
    torch.manual_seed(0)
    model = tiny_model("llama")
    full = {n: InputStatistics.from_second_moment(torch.diag(torch.rand(m.in_features) + 0.1))
            for n, m in model.named_modules() if n.endswith("_proj")}  # fmt: skip
    diagonal = {name: InputStatistics.from_power(one.power, 99) for name, one in full.items()}
    for one in full.values():
        one.tokens = 99
    sparsity = "" if compressor == "rtn" else "2:4"
    recipe = Recipe(compressor, sparsity=sparsity, group_size=32, method="lqer", rank=4, inputs="original")
    weights = []
    for statistics in (full, diagonal):
        model = tiny_model("llama")
        compress_model(model, tiny_tokens(), recipe, statistics=statistics, progress=False)
        weights.append({name: model.get_submodule(name).compressed.dense() for name in full})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in full)


def test_on_the_command_line(place, tmp_path, capsys):
    imatrix, model = str(place / "imatrix.gguf"), str(place / "model")
    given = ["--model", model, "--imatrix", imatrix, "--no-evaluate"]
    small = ["--compressor", "rtn", "--bits", "3", "--group-size", "32", "--rank", "8"]
    assert main(["compress", str(tmp_path / "run"), *given, *small]) == 1
    assert "rtn and eora: only E[x²]" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main(["compress", str(tmp_path / "run"), *given, *small, "--method", "qera_approx"]) == 0
    assert "only mean squares were known" in capsys.readouterr().out
    assert "mean squares of imatrix.gguf (imatrix)" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    grid = ["--zero-point", "integer", "--scale-dtype", "float16", "--method", "none"]
    assert main(["compress", str(tmp_path / "base"), *given, *small, *grid]) == 0
    assert main(["export", str(tmp_path / "base"), str(tmp_path / "gptq"), "--format", "gptq_v2"]) == 0
    mend = ["mend", str(tmp_path / "gptq"), str(tmp_path / "mended"), *given, "--rank", "8"]
    assert main(mend) == 1
    assert "eora: only E[x²]" in capsys.readouterr().err
    assert main([*mend, "--method", "qera_approx"]) == 0
    assert main([*mend, "--method", "qera_approx"]) == 0  # resumes: the same statistics
    _, _, report = load_run(tmp_path / "mended")
    loaded, _ = load_model(model)
    assert report.layers and all(layer.tokens == 192 for layer in report.layers)
    assert len(read_imatrix(imatrix, loaded)) == len(report.layers)
    assert main(["imatrix", model, imatrix]) == 1
    assert "is there already" in capsys.readouterr().err


def broken(harm):
    def write(place, path):
        tensors = entries(place / "imatrix.gguf")
        kind = harm(tensors) or "imatrix"
        writer = gguf.GGUFWriter(path, "")
        writer.add_type(kind)
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


Q = "blk.0.attn_q.weight"
HARMS = {
    "missing": (lambda place, path: None, "cannot read"),
    "text": (lambda place, path: path.write_text(TEXT), "is no imatrix, or damaged"),
    "cut": (lambda place, path: path.write_bytes((place / "imatrix.gguf").read_bytes()[:700]), "as an imatrix"),
    "a model": (broken(lambda t: "model"), "is no imatrix, but a GGUF file of type model"),
    "without counts": (broken(lambda t: t.pop(f"{Q}.counts") and None), f"lacks {Q}.counts"),
    "other counts": (broken(lambda t: t.update({f"{Q}.counts": np.ones((3, 1), np.float32)})), "1 rows of sums and 3"),
    "NaN": (broken(lambda t: t.update({f"{Q}.in_sum2": t[f"{Q}.in_sum2"] * np.nan})), "that are no mean squares"),
    "negative": (broken(lambda t: t.update({f"{Q}.in_sum2": -t[f"{Q}.in_sum2"]})), "that are no mean squares"),
    "another width": (broken(lambda t: t.update({f"{Q}.in_sum2": np.ones((1, 128), np.float32)})), "of another model"),
    "other names": (
        broken(lambda t: [t.update({f"other.{name}": t.pop(name)}) for name in list(t)] and None),
        "of another model",
    ),
    "an older one, cut": (lambda place, path: path.write_bytes(struct.pack("<iii", 2, 4, 7)), "it ends early"),
}


@pytest.mark.parametrize("name", HARMS)
def test_what_is_no_imatrix_of_this_model_is_one_line(name, place, tmp_path):
    harm, words = HARMS[name]
    harm(place, tmp_path / "i.gguf")
    with pytest.raises(EoraLabError, match=words) as raised:
        read_imatrix(tmp_path / "i.gguf", tiny_model("llama"))
    assert "\n" not in str(raised.value)


def test_models_and_statistics_without_a_place(tmp_path):
    with pytest.raises(EoraLabError, match="GGUF file of a dbrx model"):
        write_imatrix(tmp_path / "i.gguf", {}, mixture("dbrx"))
    with pytest.raises(EoraLabError, match="there are no statistics"):
        write_imatrix(tmp_path / "i.gguf", {}, tiny_model("llama"))
    with pytest.raises(EoraLabError, match="only with statistics="):
        compress_model(tiny_model("llama"), None, Recipe("rtn", group_size=32, rank=4), progress=False)
