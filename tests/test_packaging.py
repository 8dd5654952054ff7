"""The lists of packages agree, and importing the package stays light."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def direct_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    del extras["ray"]  # its version is that of the user's cluster
    required = [*project["dependencies"], *(r for group in extras.values() for r in group)]
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in required}


def constraints() -> dict[str, str]:
    return dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split())


def test_every_direct_dependency_is_pinned_and_nothing_else():
    assert set(constraints()) == direct_dependencies()


def test_environment_yml_lists_the_same_pins():
    text = (ROOT / "environment.yml").read_text()
    pins = dict(pin.lower().split("==") for pin in re.findall(r'- "([^"]+==[^"]+)"', text))
    assert pins == constraints()
    assert "--editable .[eval,llamacpp,lab,docs,dev]" in text


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that the Makefile makes")
def test_the_environment_is_the_pinned_one():
    for name, version in constraints().items():
        if name != "triton":  # a torch that does not use the GPU does not insist on a version
            assert metadata.version(name).split("+")[0] == version, name


def test_import_needs_no_heavy_package():
    code = """
import sys
import eora_lab, eora_lab.compress, eora_lab.compensate, eora_lab.formats, eora_lab.experiment
[getattr(eora_lab, name) for name in eora_lab.__all__]
heavy = {"lm_eval", "ipywidgets", "datasets", "transformers", "matplotlib", "pandas"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
