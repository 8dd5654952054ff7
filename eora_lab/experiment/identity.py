"""What a cell's number rests on beside its settings: the model's weights, the texts, the code.

Settings name a model, texts and methods; these digests say which ones they were. A store hands out a number only where
they agree.
"""

import os
from contextlib import nullcontext
from importlib import metadata

from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.code import code_digest, plugin_digest
from eora_lab.model.digest import files_digest, tokenizer_digest
from eora_lab.model.load import local_path
from eora_lab.text.hub import mirror_only
from eora_lab.text.read import files_in, split, text_digest


class Identities:
    """The identity of cells: each model and text is looked at once. What cannot be found here is None.

    hub: ask the hub for texts that are not on this machine.
    """

    def __init__(self, hub: bool = False):
        self._hub = hub
        self._models: dict[str, dict] = {}
        self._texts: dict[tuple, str | None] = {}

    def of(self, cell: Cell) -> dict:
        """model, tokenizer, texts, code, tasks and plugins: JSON values."""
        texts = list(cell.evaluation.perplexity)
        registries: dict[str, str] = {}
        if cell.recipe:
            texts += [cell.calibration.text, *([cell.base_source] if cell.base_source else [])]
            registries = {"SOLVERS": cell.recipe.method, "QUANTISERS": cell.recipe.compressor}
            registries |= {"PRUNERS": cell.recipe.compressor}
        used = [*registries.items(), *(("SOURCES", name) for text in texts for name in names_in(text))]
        plugins = {name: made for registry, name in used if (made := plugin_digest(registry, name))}
        found = self._model(cell.model) | {"texts": {text: self._text(text) for text in texts}, "code": code_digest()}
        found |= {"plugins": plugins} if plugins else {}
        return found | ({"tasks": harness()} if cell.tasks else {})

    def _model(self, name: str) -> dict:
        if name not in self._models:
            try:
                place = local_path(name, fetch=False)
                self._models[name] = {"model": files_digest(place), "tokenizer": tokenizer_digest(place)}
            except EoraLabError:
                self._models[name] = {"model": None, "tokenizer": None}
        return self._models[name]

    def _text(self, text: str) -> str | None:
        states = map(os.stat, files_in(text))
        key = (text, *((state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states))
        if key not in self._texts:
            try:
                with nullcontext() if self._hub else mirror_only():
                    self._texts[key] = text_digest(text)
            except EoraLabError:
                self._texts[key] = None
        return self._texts[key]


def names_in(text: str) -> list[str]:
    """The sources that a mix names, without their splits."""
    return [part.partition(":")[0] for part in split(text)]


def harness() -> str | None:
    """The version of lm-eval, which defines the tasks; None where it is not installed."""
    try:
        return f"lm-eval {metadata.version('lm-eval')}"
    except metadata.PackageNotFoundError:
        return None


def differences(kept: dict, now: dict) -> list[str]:
    """What a number was measured with that is another one now: "model", "texts", ... What is not known differs not."""
    found = []
    for key in sorted(kept.keys() | now.keys()):
        before, after = kept.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            known = [name for name in before.keys() | after.keys() if after.get(name, "") is not None]
            if any(before.get(name) != after.get(name) for name in known):
                found.append(key)
        elif after is not None and before != after:
            found.append(key)
    return found
