"""The real llama.cpp in this process: what it computes is what transformers computes of the same weights."""

import gguf
import pytest
import torch

from eora_lab import EoraLabError, collect_statistics, load_model, perplexity
from eora_lab.formats import read_checkpoint, write_imatrix
from eora_lab.formats.gguf_adapter import write_gguf_adapter
from eora_lab.measure.llama_cpp import LlamaCpp, quantise
from eora_lab.run.adapters import Adapters
from tests.gguf_files import write_gguf
from tests.tiny import compress, logits, save_tiny, tiny_model, tiny_tokens

pytest.importorskip("xllamacpp", reason="xllamacpp is the extra `llamacpp`")
TOKENS = tiny_tokens(2, 24, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama in `model`, and as `f32.gguf`."""
    place = tmp_path_factory.mktemp("llama")
    save_tiny(place / "model")
    write_gguf(place / "f32.gguf", tiny_model("llama"))
    return place


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Its cache of keys and values is in float16."""
    return bool((found - wanted).norm() < 2e-3 * wanted.norm())


def test_logits_perplexity_and_the_next_tokens_are_those_of_transformers(folder):
    model, _ = load_model(folder / "model")
    with LlamaCpp(folder / "f32.gguf", window=32) as llama:
        assert llama.vocabulary == 97
        for row in TOKENS:
            assert near(llama.logits(row), logits(model, row[None])[0])
    with LlamaCpp(folder / "f32.gguf", window=32, exact=True) as llama:
        assert torch.allclose(llama.logits(TOKENS[0]), logits(model, TOKENS[:1])[0], rtol=0, atol=1e-4)
    with LlamaCpp(folder / "f32.gguf", window=32) as llama:
        assert llama.perplexity(TOKENS) == pytest.approx(perplexity(model, TOKENS), rel=1e-3)
        start = TOKENS[0, :9].tolist()
        made = llama.continue_greedily(start, 12)
        assert len(made) == 12 and len(llama.continue_greedily(start, 99)) == 32 - 9
        for place, token in enumerate(made):  # as without the cache
            assert llama.logits([*start, *made[:place]])[-1].argmax() == token


def test_an_adapter_is_what_the_run_computes(folder, tmp_path):
    model, _ = load_model(folder / "model")
    report = compress(model, tiny_tokens(), "rtn", bits=2, group_size=32, rank=8, progress=False)
    assert any(layer.rank for layer in report.layers)
    base = tiny_model("llama")
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                base.get_submodule(name).weight.copy_(module.compressed.dense())
    write_gguf(tmp_path / "base.gguf", base)
    write_gguf_adapter(tmp_path / "lora.gguf", Adapters(model).factors(), load_model(folder / "model")[0])
    with LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf", window=32) as llama:
        with_path = llama.logits(TOKENS[0])
    with LlamaCpp(tmp_path / "base.gguf", window=32) as llama:
        without = llama.logits(TOKENS[0])
    wanted = logits(model, TOKENS[:1])[0]
    assert near(with_path, wanted) and not near(without, wanted)


def test_types_are_made_as_gguf_makes_them(folder):
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for kind in ("Q4_0", "Q5_1", "Q8_0"):
        assert (
            quantise(weight, kind).numpy() == gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
        ).all()
    errors = {}
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ3_XXS", "IQ4_XS"):
        made = gguf.quants.dequantize(quantise(weight, kind).numpy(), gguf.GGMLQuantizationType[kind])
        errors[kind] = ((torch.from_numpy(made) - weight).norm() / weight.norm()).item()
    assert errors["Q6_K"] < errors["Q4_K"] < errors["Q3_K"] < errors["Q2_K"] < 0.4
    importance = torch.ones(256)
    importance[:32] = 100
    plain, weighed = (
        torch.from_numpy(gguf.quants.dequantize(quantise(weight, "Q2_K", by).numpy(), gguf.GGMLQuantizationType.Q2_K))
        for by in (None, importance)
    )
    assert ((weighed - weight) ** 2 * importance).sum() < ((plain - weight) ** 2 * importance).sum()


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL"])
def test_a_file_made_by_our_imatrix_is_better_in_its_metric(kind, tmp_path):
    """As llama-quantize does it (tools/quantize/quantize.cpp), which no wheel holds: E[x²] = in_sum2 / counts by the
    tensor's name, which llama.cpp's own quantiser takes."""
    model = tiny_model("llama")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.uniform_(0.1, 3)  # channels of unlike size
    statistics = collect_statistics(model, tiny_tokens(), progress=False)
    write_imatrix(tmp_path / "imatrix.gguf", statistics, model)
    read = gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in read}
    stems = {name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")}
    importance = {stem: (tensors[f"{stem}.in_sum2"] / tensors[f"{stem}.counts"]).flatten() for stem in stems}
    errors = []
    for file, by in (("plain", dict.fromkeys(importance)), ("weighed", importance)):
        path = tmp_path / f"{file}.gguf"
        write_gguf(path, model, lambda key: kind if key in importance else "F32", importance=by)
        found = read_checkpoint(path).of(model)
        assert found.keys() == statistics.keys()  # every weight of the blocks was in the imatrix
        gaps = {name: model.get_submodule(name).weight - one.dense() for name, one in found.items()}
        errors.append(sum((gaps[name] ** 2 * one.second_moment.diagonal()).sum() for name, one in statistics.items()))
        with LlamaCpp(path, window=32) as llama:
            assert torch.isfinite(llama.logits(TOKENS[0])).all()
    assert (tmp_path / "plain.gguf").read_bytes() != (tmp_path / "weighed.gguf").read_bytes()
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        (256, "Q9_9", "is no type of GGUF"),
        (100, "Q4_0", "100 channels fill no blocks of 32, as Q4_0 has them"),
        (576, "Q2_K", "576 channels fill no blocks of 256"),
        (256, "IQ2_XXS", "made with the importance of the input channels only"),
    ],
)
def test_what_cannot_be_made_is_refused(columns, kind, message):
    with pytest.raises(EoraLabError, match=message):
        quantise(torch.zeros(2, columns), kind)


def test_what_cannot_be_run_is_one_line(folder, tmp_path):
    (tmp_path / "cut.gguf").write_bytes((folder / "f32.gguf").read_bytes()[:5000])
    write_gguf(tmp_path / "qwen.gguf", tiny_model("qwen2"))
    model, _ = load_model(save_tiny(tmp_path / "qwen", "qwen2"))
    compress(model, tiny_tokens(), "rtn", rank=4, progress=False)
    write_gguf_adapter(tmp_path / "lora.gguf", Adapters(model).factors(), load_model(tmp_path / "qwen")[0])
    for path, adapter, message in (
        (tmp_path / "none.gguf", None, "no file"),
        (tmp_path / "cut.gguf", None, "llama.cpp cannot load .*cut.gguf: "),
        (folder / "f32.gguf", tmp_path / "none.gguf", "no file"),
        (folder / "f32.gguf", tmp_path / "lora.gguf", "llama.cpp cannot use .*lora.gguf beside .*arch mismatch"),
    ):
        with pytest.raises(EoraLabError, match=message) as caught:
            LlamaCpp(path, adapter, window=32)
        assert "\n" not in str(caught.value)
    with LlamaCpp(folder / "f32.gguf", window=32) as llama:
        with pytest.raises(EoraLabError, match="33 tokens do not fit"):
            llama.logits([5] * 33)
        with pytest.raises(EoraLabError, match="beyond the 97"):
            llama.logits([97])
