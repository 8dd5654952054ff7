"""What several commands share: how a model is loaded, and settings as axes, each with one value or several."""

import ast
import inspect
import itertools
import sys
import textwrap
import types
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from eora_lab.model import Dtype


@dataclass(frozen=True)
class Loading:
    """How a model or a run folder is loaded."""

    dtype: Dtype | Literal["auto"] = "auto"
    """type that the model is held in; auto: bfloat16 on a GPU, float32 elsewhere"""
    device: str = "auto"
    """cpu, cuda or cuda:1; auto: an NVIDIA GPU where there is one"""
    backend: str = "auto"
    """who multiplies a run folder's compressed layers: auto (the first that can), triton, numba, int4 or tiles"""
    base: str | None = None
    """the base model of a run folder, where it is no longer in its place"""

    def load(self, name: str) -> tuple:
        """(model, tokenizer) of a model or a run folder. Where it is held, and who multiplies, is said on stderr."""
        import torch

        from eora_lab.layer.backends import check_backend
        from eora_lab.layer.linear import backends_in_use
        from eora_lab.run.folder import load_model_or_run

        check_backend(self.backend)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        model, tokenizer = load_model_or_run(name, dtype, device, self.backend, self.base)
        layers = [f"{count} layers by {one}" for one, count in backends_in_use(model).items()]
        print(f"computing in {dtype} on {device}: {', '.join(layers) or 'by torch'}", file=sys.stderr)
        return model, tokenizer


def say_start(bos: str) -> None:
    """Say what texts begin with; nothing where they begin as they are."""
    if bos:
        print(f"every sequence begins with {bos}, as this model's tokenizer begins a text")


def axes(kind: type, **defaults: tuple) -> type:
    """A dataclass with the fields of `kind`, of which all but switches take several values.

    defaults: of some fields, in place of the one value that `kind` has.
    """
    hints, texts = get_type_hints(kind), field_texts(kind)
    made: list[tuple[str, Any, Any]] = []
    for one in fields(kind):
        help_ = tyro.conf.arg(help=texts[one.name])
        if hints[one.name] is bool:
            made.append((one.name, Annotated[bool, help_], field(default=one.default)))
        else:
            several = types.GenericAlias(tuple, (hints[one.name], ...))
            made.append((one.name, Annotated[several, help_], field(default=defaults.get(one.name, (one.default,)))))
    return make_dataclass(f"{kind.__name__}Axes", made, frozen=True)


def field_texts(kind: type) -> dict[str, str]:
    """Field -> the text that stands under it in the source of its class."""
    found = {}
    for one in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body  # type: ignore[attr-defined]
        for line, below in itertools.pairwise(body):
            text = getattr(getattr(below, "value", None), "value", None)
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, str):
                found[line.target.id] = " ".join(text.split())
    return found
