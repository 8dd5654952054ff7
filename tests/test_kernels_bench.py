"""The bench where there is no GPU: its floors, its figure, the decoder's variants, and what it says."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eora_lab.errors import EoraLabError
from eora_lab.layer import backends
from eora_lab.layer.linear import backends_in_use
from eora_lab.layer.triton_kernels.configs import GPUS, rule
from eora_lab.model.structure import block_linears
from eora_lab.plots import save
from kernels.bench_cpu import layer_table, model_table, pack, random_layer, time_layer, turns, write
from kernels.check import KINDS, ROWS, check
from kernels.cpu_tables import LLAMA, RANK, SHAPES, WORDS, in_readme, readme
from kernels.figure import draw
from kernels.shapes import H200, MODELS, Dimensions, Machine, floor_us
from kernels.stack import VARIANTS, Decoder
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("shape", "bits", "rank", "microseconds"),
    [
        ((14336, 4096), 16, 0, 27.3),
        ((14336, 4096), 4, 128, 8.4),
        ((4096, 14336), 3, 64, 6.1),
        ((1024, 4096), 4, 64, 0.67),
    ],
)
def test_floors_of_a_single_row_are_bytes_over_bandwidth(shape, bits, rank, microseconds):
    assert floor_us(1, *shape, bits, rank, H200) == pytest.approx(microseconds, rel=0.02)


def test_floors_of_many_rows_are_operations_over_rate():
    assert floor_us(4096, 4096, 4096, 4, 0, H200) == pytest.approx(2 * 4096**3 / H200.rate * 1e6)


def test_a_block_of_llama_3_8b_has_its_published_size():
    parameters = sum(n * k for n, k in MODELS["llama-3-8b"].linears.values())
    assert parameters == 218_103_808


def test_every_variant_of_the_decoder_computes_the_same():
    dimensions = Dimensions(256, 384, 4, 2, 64, 2, 100)
    logits = {}
    for variant in VARIANTS:
        torch.manual_seed(0)
        decoder = Decoder(dimensions, 4, 8, variant, "cpu", torch.bfloat16, context=16)
        logits[variant] = decoder(torch.zeros(1, dtype=torch.long)).double()
    dense = logits.pop("dense16")
    for variant, other in logits.items():
        assert (other - dense).norm() / dense.norm() < 8e-3, variant


def test_the_figure_shows_floors_and_what_was_measured(tmp_path):
    row = {"N": 14336, "K": 4096, "dtype": "bfloat16", "bits": 4, "M": 1, "peer": "fused", "us": 10.0}
    measured = {"gpu": "a GPU", "bandwidth": 4e12, "rate": 7e14, "layers": [row]}
    results = {"floors": None, "points": measured}
    plain, with_point = (save(draw(result), tmp_path / name)[1] for name, result in results.items())
    assert plain.stat().st_size and with_point.read_text() != plain.read_text()


def test_the_committed_floors_are_those_of_the_code(tmp_path):
    assert save(draw(None), tmp_path / "floors")[1].read_bytes() == (ROOT / "kernels/floors.svg").read_bytes()


def test_the_check_names_who_computes_why_and_how_well(capsys):
    machine = Machine("this machine", 1e10, 1e11)
    assert check(torch.device("cpu"), torch.float32, machine, 128, 8, 0.0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if not line.startswith("  not by")] == ["right"] * len(KINDS) * len(ROWS)
    assert any("triton (W4)" in line and "an NVIDIA GPU" in line for line in lines)


def test_the_check_sees_a_wrong_product(capsys, monkeypatch):
    class Wrong(backends.Backend):
        name = "wrong"

        def why_not(self, layer, x, gradients):
            return None if layer.sample.bits == 8 else "8 bits only"

        def prepare(self, layer):
            return lambda layer, x: 1.001 * backends.with_path(backends.in_tiles)(layer, x)

    monkeypatch.setattr(backends, "BACKENDS", {"wrong": Wrong()} | backends.BACKENDS)
    machine = Machine("this machine", 1e10, 1e11)
    assert check(torch.device("cpu"), torch.float32, machine, 128, 8, 0.0) == len(ROWS)
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.kernels
def test_the_tuner_tries_what_the_rule_ships():
    pytest.importorskip("triton", reason="Triton is not installed")
    from kernels.tune import candidates

    for gpu in GPUS.values():
        for rows, bits in itertools.product((1, 64, 256, 1024), (3, 4)):
            found = candidates(rows, 14336, 4096, bits, 64, gpu)
            assert found[0] == rule(rows, 14336, 4096, bits, 64, gpu) and len(set(found)) == len(found)
            splits = {config.split_k for config in found if config.path == "decode"}
            assert rows > 64 or splits >= {1, 2, 4, 8}
            assert rows <= 64 or any(config.num_warps == 8 for config in found)


@pytest.mark.kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["bench", "tune"])
def test_says_in_one_line_that_it_needs_a_gpu(command):
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run([sys.executable, "-m", f"kernels.{command}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "GPU" in done.stderr


def test_recorded_results_say_where_they_are_from():
    for path in (ROOT / "kernels/results").rglob("*.json"):
        machine = "machine" if path.parent.name == "cpu" else "gpu"
        assert {machine, "date", "command", "versions", "layers"} <= set(json.loads(path.read_text())), path


def test_the_cpu_bench_times_every_road_of_a_layer():
    rows = time_layer(64, 128, 4, 8, rounds=1)
    table = layer_table({"layers": rows, "bandwidth": 1e9})
    both = ("numba", "tiles", "dense")
    assert set(table["road"]) == {f"{road}, float32" for road in both} | {
        f"{road}, bfloat16" for road in (*both, "int4")
    }
    assert (table[["least", "median", "of bandwidth"]] > 0).all(axis=None)
    assert table.set_index("road")["x dense, float32"]["dense, float32"] == 1


def test_the_cpu_bench_times_nothing_wrong():
    layer = random_layer(64, 128, 3, 8, torch.float32)
    with pytest.raises(EoraLabError, match="is wrong: relative error 1"):
        turns(layer, 1000, torch.ones(1, 128), 1e6 * torch.ones(1, 64))


def test_the_cpu_bench_packs_and_writes_with_a_model():
    model = tiny_model("llama").eval()
    packed = pack(model, 4, bits=3, group_size=16)
    assert backends_in_use(packed) == {"numba": len(block_linears(model))}
    assert write(packed, torch.ones(1, 3, dtype=torch.long)) > 0
    rows = [{"model": name, "least": 1, "median": 2} for name in ("dense, float32", "dense, bfloat16")]
    assert list(model_table({"models": rows})["median"]) == [0.5, 0.5]


def test_the_readme_says_what_the_cpu_bench_recorded():
    roads = {"numba, float32": 2e-3, "tiles, float32": 8e-2, "dense, float32": 5e-3}
    layers = [
        {"layer": f"{N} x {K}", "bits": bits, "rank": RANK, "road": road, "bytes": 3e7, "least": time, "median": time}
        for N, K in SHAPES
        for bits in (4, 3)
        for road, time in roads.items()
    ]
    names = [f"{kind}, {dtype}" for dtype in ("float32", "bfloat16") for kind in ("dense", "W4, rank 64, numba")]
    names += [f"W3, rank 64, numba, {dtype}" for dtype in ("float32", "bfloat16")]
    models = [{"model": name, "least": 0.01, "median": 0.02 if "W" in name else 0.05} for name in names]
    machine = {"threads": 2, "processor": "A B"}
    result = {"rounds": 30, "machine": machine, "bandwidth": 6e10, "layers": layers, "models": models}
    text = readme(result)
    assert "30 rounds on 2 threads that read memory at 60.0 GB/s" in text and "results/cpu/A-B.json" in text
    assert text.count("| 2.00 | 40 | 2.5 | 25 % |") == 4 and text.count("| 20.0 | 50.0 | 50.0 |") == 2
    assert "llama.cpp" not in text and set(in_readme(result)) == set(WORDS[:-1])
    models.append({"model": LLAMA, "least": 0.01, "median": 0.01})
    assert "llama.cpp writes 100.0" in readme(result)
