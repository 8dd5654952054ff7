"""Shapes in annotations are checked while tests run; small tests use one thread, which is faster for them."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# In the background of a shell Ctrl-C is ignored, and would be by the commands that tests stop with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A package's name stands for all in it.
WHOLE = ("eora_lab", "eora_lab.layer", "eora_lab.layer.cpu_kernels", "eora_lab.layer.triton_kernels")


def checked_modules() -> list[str]:
    """All modules but those that a compiler reads: it cannot compile a function that a check is wrapped around."""
    root = Path(__file__).parent.parent
    modules = []
    for path in root.glob("eora_lab/**/*.py"):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text()
        if name not in WHOLE and not any(mark in text for mark in ("@triton.jit", "@njit", "@intrinsic")):
            modules.append(name)
    return modules


hook = install_import_hook(checked_modules(), "beartype.beartype")

settings.register_profile("eora_lab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thousand", settings.get_profile("eora_lab"), max_examples=1000)
settings.load_profile("eora_lab")


FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
THREADS = torch.get_num_threads()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture is made, also one of a module: what is computed may depend on the threads in its last bit."""
    torch.set_num_threads(THREADS if item.get_closest_marker("real") else 1)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder, which is the current one, with a tiny model and a text."""
    from tests.tiny import TEXT, tiny_model, tiny_tokenizer

    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture(scope="module")
def browser():
    """The Chromium of the system, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is the extra `dev`")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if (found := shutil.which(name))), None)
    if not chromium:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as play:
        running = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()
