"""The embedded language model: the design's table, the sequential pass, GPTQ, and a run that is killed and resumed."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eora_lab import collect_statistics, load_model, load_run, perplexity, token_windows
from tests.tiny import compress

pytestmark = pytest.mark.real

MIRROR = Path(os.environ.get("EORA_LAB_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def wikitext2(smollm2):
    """(calibration, test) windows of 512 tokens."""
    if not (MIRROR / "Salesforce/wikitext").is_dir():
        pytest.skip(f"no WikiText-2 in {MIRROR}: set EORA_LAB_DATA to a mirror that has it")
    os.environ["EORA_LAB_DATA"] = str(MIRROR)
    tokenizer = smollm2[1]
    return token_windows(tokenizer, "wikitext2:validation", 32), token_windows(tokenizer, "wikitext2:test", 20)


@pytest.fixture(scope="module")
def statistics(smollm2, wikitext2):
    return collect_statistics(smollm2[0], wikitext2[0])


def compressed_perplexity(smollm2, calibration, windows, **settings) -> float:
    model = copy.deepcopy(smollm2[0])
    compress(model, calibration, **settings)
    return perplexity(model, windows)


def test_rtn_3_bit_reproduces_the_reference_table(smollm2, wikitext2, statistics):
    """Cells that a prototype of the same settings printed; a fresh implementation must land within 1 %."""
    calibration, windows = wikitext2
    assert perplexity(smollm2[0], windows) == pytest.approx(36.02, rel=1e-3)
    for method, rank, published in (("svd", 64, 97.92), ("qera_approx", 64, 49.52), ("eora", 64, 47.09)):
        settings = {"bits": 3, "method": method, "rank": rank, "inputs": "original", "statistics": statistics}
        assert compressed_perplexity(smollm2, calibration, windows, **settings) == pytest.approx(published, rel=0.01)


def test_wanda_2_4_reproduces_the_reference_table(smollm2, wikitext2, statistics):
    settings = {"compressor": "wanda", "sparsity": "2:4", "bits": 16, "inputs": "original", "statistics": statistics}
    for method, published in (("none", 208.88), ("eora", 68.91)):
        value = compressed_perplexity(smollm2, *wikitext2, **settings, method=method)
        assert value == pytest.approx(published, rel=0.01)


def test_sparsegpt_2_4_alone(smollm2, wikitext2, statistics):
    settings = {"compressor": "sparsegpt", "sparsity": "2:4", "bits": 16, "method": "none", "inputs": "original"}
    assert compressed_perplexity(smollm2, *wikitext2, **settings, statistics=statistics) <= 110


def test_gptq_3_bit_is_as_small_on_disk_as_reported(smollm2, wikitext2, statistics, tmp_path):
    model = copy.deepcopy(smollm2[0])
    settings = {"compressor": "gptq", "bits": 3, "zero_point": "integer", "scale_dtype": "float16", "mse": True}
    report = compress(
        model,
        wikitext2[0],
        **settings,
        method="none",
        inputs="original",
        statistics=statistics,
        folder=tmp_path / "run",
    )
    on_disk = sum(file.stat().st_size for file in (tmp_path / "run" / "blocks").iterdir())
    assert report.nbytes < on_disk < 1.02 * report.nbytes and 8 * on_disk / report.weights < 3.6
    assert perplexity(model, wikitext2[1]) <= 60


def test_compensated_inputs_do_better(smollm2, wikitext2):
    assert compressed_perplexity(smollm2, *wikitext2, bits=3, method="eora", rank=64) <= 46.6


def test_gptq_4_bit_with_eora_from_8_samples(smollm2, wikitext2):
    calibration, windows = wikitext2
    value = compressed_perplexity(smollm2, calibration[:8], windows, compressor="gptq", bits=4)
    assert value <= 1.065 * 36.02


def test_a_killed_run_resumes(smollm2, tmp_path):
    """SIGKILL in the middle of the pass; the same command goes on from the last finished block."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "eora_lab.cli", "compress", str(run), "--compressor", "rtn", "--no-evaluate"]
    command += ["--calibration.nsamples", "2", "--calibration.seqlen", "64"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "blocks" / "003.safetensors").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "report.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (run / "blocks").glob("*.safetensors")}
    assert 4 <= len(before) < 30
    subprocess.run(command, check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    model, _, report = load_run(run)
    assert len(report.layers) == 210
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(20)[None]).logits).all()
