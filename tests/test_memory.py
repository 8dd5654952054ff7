"""A pass takes the memory of one block: the others lie in files, and what is measured and predicted says so."""

import gc
import json
import platform
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from docs.scale_models import Shape, make, make_file
from eora_lab import EoraLabError, load_model, load_run
from eora_lab.calibrate.contract import check_blocks
from eora_lab.cli import main
from eora_lab.environment import OwnMemory, free_memory, own_memory
from eora_lab.files import read_ahead, read_tensors
from eora_lab.layer.linear import CompensatedLinear, compensated, unpacked
from eora_lab.measure.evaluate import by_block, window_losses
from eora_lab.model.structure import decoder_blocks, linears
from eora_lab.run.folder import read_report
from eora_lab.run.memory import check_room, needed
from eora_lab.run.recipe import Recipe
from tests.tiny import CONFIGS, SMALL, compress, deep_model, logits, save_tiny, tiny_model, tiny_tokens

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is of files")
LAYERS = 7  # linears of a block


def plain_losses(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of every window by itself, through the model as it is."""
    with torch.no_grad():
        each = [cross_entropy(model(w[None], use_cache=False).logits[0, :-1], w[1:]) for w in tokens]
    return torch.stack(each).double()


def file_of(tensor: torch.Tensor) -> str:
    """The name of the file that is mapped where a tensor lies; empty for memory of its own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, name = line.split(maxsplit=5) if line.count("/") else (line.split()[0], "")
        start, stop = (int(one, 16) for one in place.split("-"))
        if start <= tensor.data_ptr() < stop:
            return Path(name.strip()).name
    raise AssertionError("nothing is mapped there")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("compressed", [False, True])
def test_windows_walked_block_by_block_give_the_logits_of_the_model(kind, compressed):
    model, tokens = tiny_model(kind), tiny_tokens(5, 24, seed=2)
    if compressed:
        compress(model, tiny_tokens(), **SMALL)
    found = torch.stack(list(by_block(model, tokens, {})))
    with unpacked(model):  # the products are then the same to the bit
        assert torch.equal(found, torch.cat([logits(model, window[None]) for window in tokens]))


def test_walked_blocks_may_return_more_than_hidden_states():
    config = transformers.GPTNeoXConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    compress(model, tiny_tokens(), **SMALL)
    tokens = tiny_tokens(3, 24, seed=2)
    torch.testing.assert_close(window_losses(model, tokens), plain_losses(model, tokens), rtol=1e-6, atol=0)


def test_a_model_whose_blocks_tell_each_other_more_is_not_walked():
    """As nothing tries before where a pass has statistics and no texts."""
    model, tokens, said = tiny_model("llama"), tiny_tokens(3, 24, seed=2), {}
    compress(model, tiny_tokens(), **SMALL)
    first, second = model.model.layers[:2]
    first.register_forward_hook(lambda _module, _args, output: said.update(mean=output.mean()))
    second.register_forward_hook(lambda _module, _args, output: output + 10 * said["mean"])
    torch.testing.assert_close(window_losses(model, tokens), plain_losses(model, tokens), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_perplexity_of_a_compressed_model_holds_one_block_dense(kind):
    model, tokens = tiny_model(kind), tiny_tokens(3, 24, seed=2)
    compress(model, tiny_tokens(), **SMALL)
    dense: list[int] = []

    def count(_module, _args):
        dense.append(sum(layer.keep_dense for layer in compensated(model).values()))

    for block in decoder_blocks(model).values():
        block.register_forward_pre_hook(count)
    found = window_losses(model, tokens)
    assert max(dense) == LAYERS
    assert not any(layer.made for layer in compensated(model).values())  # no second copy of W^, for few rows
    torch.testing.assert_close(found, plain_losses(model, tokens), rtol=1e-6, atol=0)


def test_more_windows_than_are_walked_together_give_the_same_losses(monkeypatch):
    model, tokens = tiny_model("llama"), tiny_tokens(5, 24, seed=2)
    compress(model, tiny_tokens(), **SMALL)
    whole = window_losses(model, tokens)
    monkeypatch.setattr("eora_lab.measure.evaluate.TOGETHER", 48)
    assert torch.equal(window_losses(model, tokens), whole)


@pytest.mark.parametrize("settings", [{}, {"inputs": "original"}, {"true_sequential": True}])
def test_a_kept_pass_holds_one_compressed_block_and_gives_what_one_in_memory_gives(settings, tmp_path):
    held: list[int] = []
    model, other = tiny_model("llama"), tiny_model("llama")

    def count(_module, _args):
        held.append(len({name.split(".")[2] for name in compensated(model)}))

    handles = [block.register_forward_pre_hook(count) for block in decoder_blocks(model).values()]
    kept = compress(model, tiny_tokens(), **SMALL, **settings, folder=tmp_path / "run")
    for handle in handles:
        handle.remove()
    assert max(held) <= 1
    assert len(compensated(model)) == 2 * LAYERS
    report = compress(other, tiny_tokens(), **SMALL, **settings)
    assert torch.equal(logits(model, tiny_tokens(2, seed=1)), logits(other, tiny_tokens(2, seed=1)))
    assert [layer.error_after for layer in kept.layers] == [layer.error_after for layer in report.layers]


def test_a_layer_from_a_file_holds_no_other_packed_tensors():
    model = tiny_model("llama")
    compress(model, tiny_tokens(), **SMALL)
    layer = next(iter(compensated(model).values()))
    stored, old = layer.stored(), nn.Linear(layer.in_features, layer.out_features, bias=False)

    def packed() -> int:
        gc.collect()
        found = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.dtype == torch.uint8]
        return len({one.untyped_storage().data_ptr() for one in found if one.numel() > 512})  # less: names, in bytes

    before = packed()
    again = CompensatedLinear.from_stored(stored, old)
    assert packed() == before and torch.equal(again.dense(), layer.dense())


@LINUX
def test_weights_of_a_pass_lie_in_files(tmp_path):
    model, _ = load_model(save_tiny(tmp_path / "model"))
    linear = "model.layers.0.mlp.up_proj"
    assert file_of(model.get_submodule(linear).weight) == "model.safetensors"
    compress(model, tiny_tokens(), **SMALL, folder=tmp_path / "run")
    for one in (model, load_run(tmp_path / "run")[0]):
        for name, layer in compensated(one).items():
            index = int(name.split(".")[2])
            assert {file_of(t) for t in layer.stored_weight().values() if t.ndim == 2} == {f"{index:03d}.safetensors"}


@LINUX
def test_memory_of_its_own_is_told_from_pages_of_files(tmp_path):
    (tmp_path / "file").write_bytes(bytes(64 * 2**20))
    before = own_memory()
    with OwnMemory() as own:
        mapped = torch.from_file(str(tmp_path / "file"), size=64 * 2**20, dtype=torch.uint8)
        assert int(mapped.max()) == 0
        assert own_memory() - before < 32 * 2**20
        plain = torch.ones(64 * 2**20, dtype=torch.uint8)
        assert own_memory() - before > 60 * 2**20
        del plain
        sizes = torch.ones(256 * 2**20, dtype=torch.uint8)
        while own.peak - before < 250 * 2**20:  # it looks every 20 ms
            pass
        del sizes
    assert own.peak - before < 400 * 2**20


def pages_of_files() -> int:
    """Bytes of files that are in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem")))


@LINUX
def test_what_is_read_ahead_is_there_and_takes_no_memory_of_its_own(tmp_path):
    size = 2**26
    save_file({"weight": torch.ones(size // 2, dtype=torch.bfloat16), "one": torch.ones(())}, tmp_path / "w")
    mapped = read_tensors(tmp_path / "w")
    there, own = pages_of_files(), own_memory()
    read_ahead([mapped["weight"], mapped["weight"][::2], mapped["one"], torch.empty(3, 0)]).join()
    assert pages_of_files() - there > 0.9 * size
    assert own_memory() - own < 0.1 * size
    assert mapped["weight"].sum().item() == size // 2


GIVEN_BACK = """
import ctypes
from eora_lab.cli.allocator import keep_freed_memory

keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
start = library.sbrk(0)
pieces = [library.malloc(24 << 20) for _ in range(4)]
for piece in pieces:
    library.free(ctypes.c_void_p(piece))
kept = library.sbrk(0)
library.malloc(40 << 20)
print(kept - start, library.sbrk(0) - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to do with freed memory")
def test_commands_keep_what_activations_give_back_and_no_large_pieces():
    said = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True).stdout
    kept, after_a_large_one = map(int, said.split())
    assert kept == after_a_large_one >= 4 * (24 << 20)


def test_free_memory_is_some():
    assert 2**20 < free_memory() < 2**50


def needs(
    model: nn.Module, shape: tuple[int, int] = (6, 32), spread: bool = False, on_disk: bool = False, **settings
) -> dict[str, int]:
    recipe = Recipe("rtn", **{"rank": 8} | settings)
    return needed(model, recipe, check_blocks(model, tiny_tokens()), shape, spread=spread, on_disk=on_disk)


def test_what_a_pass_needs_is_of_its_largest_block():
    model = tiny_model("llama")
    found = needs(model)
    assert found["statistics of a block"] == 4 * (3 * 64**2 + 128**2)  # q, k, v; o; gate, up; down
    assert found["hidden states"] == 6 * 32 * 64 * 4
    assert needs(deep_model(8)) == found
    assert needs(deep_model(8), spread=True)["statistics of all blocks"] == 8 * found["statistics of a block"]
    assert needs(model, held_out=0.5)["statistics of a block"] == 2 * found["statistics of a block"]
    assert needs(model, true_sequential=True)["statistics of a block"] == 4 * 128**2
    assert needs(model, (60, 32))["hidden states"] == 10 * found["hidden states"]
    assert needs(model, (60, 32), inputs="drift", held_out=0.5)["hidden states"] == 20 * found["hidden states"]
    kept = needs(model, (60, 32), on_disk=True)["hidden states"]  # those of a mini-batch
    assert kept == needs(model, (4, 32))["hidden states"] < found["hidden states"]


def test_gradients_need_no_more_than_there_is_room_for(monkeypatch):
    model = tiny_model("llama")
    found = needs(model, method="eora_fisher", distil=True, held_out=0.5)
    assert found["hidden states"] == needs(model)["hidden states"]
    sizes = [linear.weight.shape for linear in linears(model.model.layers[0]).values()]
    block = 4 * sum(out * size + out**2 + size**2 for out, size in sizes)  # G, F and S in float32
    paths = 2 * 8 * sum(map(sum, sizes))  # in float16, those of the pass and with six shares of the step
    others = found["hidden states"] + 7 * 2 * paths  # what leaves the original's last block
    assert found["distillation"] == others + 2 * block
    monkeypatch.setattr("eora_lab.run.memory.SUMS", 1)  # a block at a time
    assert needs(model, method="eora_fisher", distil=True, held_out=0.5)["distillation"] == others + block
    assert 0 < found["gradients"] < needs(model, (6, 64), method="eora_fisher")["gradients"]
    deep, long = deep_model(8), {"method": "eora_fisher", "shape": (6, 10**7)}
    assert needs(deep, **long)["gradients"] == needs(model, **long)["gradients"]


@pytest.mark.parametrize(
    ("shape", "spread", "advice"),
    [
        (
            (10**9, 512),
            False,
            "most of it for hidden states .*[(]--hidden-states disk[)], or take fewer calibration tokens",
        ),
        ((4, 10**10), False, "most of it for activations .* take shorter sequences"),
        ((4, 32), True, "most of it for statistics of all blocks .* leave the budget out"),
    ],
)
def test_a_pass_that_cannot_fit_names_what_would_make_it_fit(shape, spread, advice):
    found = needs(tiny_model("llama"), shape, spread)
    if spread:
        found["statistics of all blocks"] *= 10**9
    with pytest.raises(EoraLabError, match=advice):
        check_room(found, torch.device("cpu"))


def test_every_switch_that_would_be_enough_by_itself_is_named():
    free = free_memory()
    found = {"hidden states": free * 2 // 3, "statistics of a block": free // 2, "activations": 10}
    with pytest.raises(EoraLabError) as caught:
        check_room(found, torch.device("cpu"))
    message = str(caught.value)
    assert "most of it for hidden states" in message
    assert "--hidden-states disk" in message and "--true-sequential" in message and "shorter" not in message


def test_a_model_that_does_not_fit_in_another_dtype_is_refused_before_it_is_read(tmp_path):
    folder = Path(save_tiny(tmp_path / "model"))
    rows = free_memory() // 3  # the file has them as a hole, which takes no room on the disk
    header = json.dumps({"model.norm.weight": {"dtype": "BF16", "shape": [rows], "data_offsets": [0, 2 * rows]}})
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + 2 * rows)
    with pytest.raises(EoraLabError, match=r"GB in float32, .* \(--dtype bfloat16, .* as its files are"):
        load_model(folder)


@LINUX
def test_a_q4_0_file_of_the_bench_is_mended_in_the_dtype_of_its_original(tmp_path):
    shape = Shape(hidden=256, ffn=512, blocks=3, kv_heads=1, vocabulary=320)
    make(tmp_path / "model", shape)
    make_file(tmp_path / "model" / "model.gguf", shape)
    start = ["mend", str(tmp_path / "model" / "model.gguf"), str(tmp_path / "run"), "--model", str(tmp_path / "model")]
    length = ["--calibration.nsamples", "2", "--calibration.seqlen", "64", "--evaluation.window-length", "64"]
    assert main([*start, *length, "--dtype", "bfloat16", "--rank", "16", "--evaluation.windows", "2"]) == 0
    report = read_report(tmp_path / "run")
    assert {layer.rank for layer in report.layers} == {16} and len(report.layers) == 3 * LAYERS
    assert all(0 < layer.error_after < layer.error_before < 0.05 for layer in report.layers)
    assert 0 < report.own_memory <= report.peak_memory
    assert report.needed_memory > 0
