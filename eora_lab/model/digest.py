"""Which model is it? One digest for all weights: of the files that it was loaded from, or of the tensors themselves.

Files are read for it once, and remembered by path, size and times. A model that was changed after it was loaded, or
came from no files, is known by its tensors.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eora_lab.environment import step
from eora_lab.errors import EoraLabError, as_setting
from eora_lab.files import digest, file_digest, read_json, write_json
from eora_lab.model.embedded import cache_folder

REMEMBERED = "digests.json"  # in the cache folder
MODELS = 200  # whose tensors are remembered
TENSORS = "tensors "  # begins the digest of a model that is not as its files are
WEIGHTS = ("*.safetensors", "*.gguf")
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.jinja", "*.tiktoken", "tekken.json"),
)
# of config.json, what does not change what a model computes
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures")


class Origin(NamedTuple):
    """Digests of what a model was loaded from: its files, its tensors as they came, its tokenizer; "" if unknown."""

    files: str = ""
    tensors: str = ""
    tokenizer: str = ""


@step("checks")
def model_digest(model: nn.Module) -> str:
    """A hash of all weights and of the configuration: of the files if the model is as they are, else of its tensors."""
    tensors, known = tensors_digest(model), origin(model)
    return known.files if tensors == known.tensors else TENSORS + tensors


def origin(model: nn.Module) -> Origin:
    """What a model was loaded from, as noted on it."""
    return getattr(model, "eora_lab_origin", Origin())


@step("checks")
def note_origin(model: nn.Module, path: Path) -> None:
    """Note on a model, just loaded, which files it is from. `path`: its folder, or its GGUF file."""
    import transformers

    files, remembered = files_digest(path), _Remembered()
    key = f"{files} {model.dtype} {transformers.__version__}"
    if key not in remembered.tensors:
        remembered.tensors[key] = tensors_digest(model)
        remembered.keep()
    found = Origin(files, remembered.tensors[key], tokenizer_digest(path))
    model.eora_lab_origin = found  # type: ignore[assignment]


def tensors_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name, type and size, and of the configuration."""
    settings = model.config.to_dict()  # type: ignore[operator, union-attr]
    config = json.loads(json.dumps(_lasting(settings), default=str))
    found, seen = hashlib.sha256(digest(config).encode()), set()
    for name, tensor in _tensors(model):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.data_ptr() in seen:  # tied to one before
            continue
        seen.add(tensor.data_ptr())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name -> tensor, as in the state_dict, but for experts: fused, they would be copies."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        lasting = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in (module._parameters | lasting).items():
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor


def files_digest(path: Path) -> str:
    """The same for a model's folder, or its GGUF file, without loading it."""
    remembered = _Remembered()
    files = [path] if path.is_file() else sorted({file for kind in WEIGHTS for file in path.glob(kind)})
    found: dict = {file.name: remembered.file(file) for file in files}
    if path.is_dir():
        config = path / "config.json"
        try:
            found["config"] = _lasting(json.loads(config.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError) as error:
            raise EoraLabError(f"cannot read {config}: {error}") from error
    remembered.keep()
    return digest(found)


def tokenizer_digest(path: Path) -> str:
    """A hash of the tokenizer in a model's folder, or in its GGUF file."""
    remembered = _Remembered()
    files = [path] if path.is_file() else sorted({file for kind in TOKENIZER for file in path.glob(kind)})
    found = {file.name: remembered.file(file) for file in files if file.is_file()}
    remembered.keep()
    return digest(found)


def _lasting(config: dict) -> dict:
    """A configuration without what does not count, and without what is not said."""
    kept = {key: value for key, value in config.items() if key not in VOLATILE and value is not None}
    return {key: _lasting(value) if isinstance(value, dict) else value for key, value in kept.items()}


class _Remembered:
    """Digests in the cache folder. A folder that cannot be read or written costs time, and nothing else."""

    def __init__(self):
        self.path, self._changed = cache_folder() / REMEMBERED, False
        try:
            found = read_json(self.path)
            self.files = as_setting(dict[str, list], found["files"], "files")
            self.tensors = as_setting(dict[str, str], found["tensors"], "tensors")
        except (EoraLabError, KeyError):
            self.files, self.tensors = {}, {}
        self._before = json.dumps([self.files, self.tensors])

    def file(self, path: Path) -> str:
        """SHA-256 of a file, read again when its size or times changed."""
        path = path.resolve()
        try:
            about = path.stat()
            state = [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
            if self.files.get(str(path), [None])[:-1] != state:
                self.files[str(path)] = [*state, file_digest(path)]
        except OSError as error:
            raise EoraLabError(f"cannot read {path}: {error.strerror}") from error
        return self.files[str(path)][-1]

    def keep(self) -> None:
        """Write down what is new, without what is gone."""
        if json.dumps([self.files, self.tensors]) != self._before:
            self.files = {path: known for path, known in self.files.items() if Path(path).exists()}
            self.tensors = dict(list(self.tensors.items())[-MODELS:])
            with contextlib.suppress(EoraLabError):
                write_json(self.path, {"files": self.files, "tensors": self.tensors})
