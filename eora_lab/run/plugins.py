"""A user's own methods, formats and texts, without editing the package: one Python file, or an installed package.

A plugin is a module with some of the names in `REGISTRIES`, each a dict like the package's own of that name:

    SOLVERS = {"mine": mine}    # and QUANTISERS, PRUNERS, SOURCES, KINDS, FORMATS, BACKENDS

An installed package names such modules in the entry-point group "eora_lab.plugins".
"""

import hashlib
import importlib.util
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from eora_lab.compensate import SOLVERS
from eora_lab.compress import KINDS, PRUNERS, QUANTISERS
from eora_lab.errors import EoraLabError, one_line
from eora_lab.formats import FORMATS
from eora_lab.layer.backends import BACKENDS
from eora_lab.text.sources import SOURCES

GROUP = "eora_lab.plugins"
REGISTRIES: dict[str, dict] = {
    "SOLVERS": SOLVERS,
    "QUANTISERS": QUANTISERS,
    "PRUNERS": PRUNERS,
    "SOURCES": SOURCES,
    "KINDS": KINDS,
    "FORMATS": FORMATS,
    "BACKENDS": BACKENDS,
}
OWN = {registry: frozenset(names) for registry, names in REGISTRIES.items()}  # the package's

_added: dict[tuple[str, str], Path] = {}  # (registry, name) -> the file that it comes from


def load_plugin(file: Path | str) -> list[str]:
    """Load a plugin file, or load it again after it was changed. Returns the names that it added.

    Raises EoraLabError when the file cannot be run, adds nothing, or takes a name of the package or of another plugin.
    """
    path = Path(file).expanduser().resolve()
    if not file or not path.is_file():
        raise EoraLabError(f"no plugin {file}: give a Python file")
    name = f"eora_lab_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise EoraLabError(f"{file} is no Python file: a plugin's name ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode  # no __pycache__ beside a user's file
        spec.loader.exec_module(module)
    except Exception as error:
        raise EoraLabError(f"the plugin {file} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.dont_write_bytecode = before
    sys.modules[name] = module
    return _register(module, path)


@cache
def load_installed() -> tuple[str, ...]:
    """Load the plugins of installed packages, once. Returns the names that they added. Raises as `load_plugin`."""
    added: list[str] = []
    for entry in metadata.entry_points(group=GROUP):
        try:
            module = entry.load()
        except Exception as error:
            raise EoraLabError(f"the plugin {entry.value} cannot be loaded: {one_line(error)}") from error
        added += _register(module, Path(module.__file__ or entry.value))
    return tuple(added)


def _register(module: ModuleType, path: Path) -> list[str]:
    """Put what a module offers into the package's registries."""
    offered: dict[tuple[str, str], Any] = {}
    for registry, ours in REGISTRIES.items():
        theirs = vars(module).get(registry, {})
        if theirs is ours:
            for name in [name for name in ours if name not in OWN[registry] and (registry, name) not in _added]:
                del ours[name]
            raise EoraLabError(f"the plugin {path} changes the package's {registry}: let it define a dict of that name")
        if not isinstance(theirs, dict) or not all(isinstance(name, str) for name in theirs):
            raise EoraLabError(f"the plugin {path} defines {registry}, which is no dict whose keys are names")
        offered |= {(registry, name): value for name, value in theirs.items()}
    if not offered:
        raise EoraLabError(f"the plugin {path} adds nothing: it defines none of {', '.join(REGISTRIES)}")
    for registry, name in offered:
        if name in OWN[registry] or _added.get((registry, name), path) != path:
            raise EoraLabError(f"the plugin {path} cannot add {name!r} to {registry}: that name is taken")
    for key in [key for key, origin in _added.items() if origin == path]:  # what it had added before it was changed
        REGISTRIES[key[0]].pop(key[1], None)
        del _added[key]
    for (registry, name), value in offered.items():
        if registry == "BACKENDS":  # before the package's own, whose last one takes every layer
            rest = dict(BACKENDS)
            BACKENDS.clear()
            BACKENDS.update({name: value} | rest)
        else:
            REGISTRIES[registry][name] = value
        _added[registry, name] = path
    return [name for _, name in offered]


def plugin_files() -> list[Path]:
    """The files of all plugins that are loaded: what another process must load to do the same."""
    return list(dict.fromkeys(_added.values()))


def plugin_of(registry: str, name: str) -> Path | None:
    """The file that a name comes from, where it is not the package's own."""
    return _added.get((registry, name))
