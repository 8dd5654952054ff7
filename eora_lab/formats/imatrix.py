"""Importance matrices of llama.cpp: E[x²] of every input channel of every weight, as llama-imatrix measures them.

A GGUF file of type "imatrix" has for each tensor T of a model `T.in_sum2` (matrices, in), sums of x² over tokens, and
`T.counts` (matrices, 1), how many tokens; an expert is a matrix. The older form (.dat) has mean values times a number of
chunks. Both are read, the first is written; llama-quantize takes it (--imatrix).
Source: tools/imatrix/imatrix.cpp of llama.cpp, October 2026.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.errors import EoraLabError, one_line
from eora_lab.files import write_atomically
from eora_lab.formats.fused import fused_linears
from eora_lab.formats.gguf_names import GgufNames, of_all_experts
from eora_lab.model.structure import block_linears

SUMS, COUNTS = ".in_sum2", ".counts"
Entries = dict[str, tuple[Float[Tensor, "matrices in"], Float[Tensor, " matrices"]]]  # tensor -> (E[x²], tokens)


def read_imatrix(path: Path | str, model: nn.Module) -> dict[str, InputStatistics]:
    """Statistics of the linears of a model that a file knows: module name -> the diagonal of S.

    What the model's gate and up projections share, and its q, k and v, has an object for each.
    Experts that saw no token get the mean of those that did, as no statistics would be zero.

    model: with its experts unfolded; without weights will do (`load_skeleton`).
    Raises EoraLabError when the file cannot be read or is of another model, and for a model type whose names in GGUF
    files are not known.
    """
    path, entries = Path(path), _read(Path(path))
    linears, found = block_linears(model), {}
    for name, places in _places(model).items():
        given = [(entries[tensor], index) for tensor, index in places if tensor in entries]
        if not given:
            continue
        (means, tokens), index = given[0]
        if means.shape[1] != linears[name].in_features or index >= len(means):
            raise EoraLabError(
                f"{path} is of another model: {places[0][0]} has {len(means)} x {means.shape[1]} values, and {name} "
                f"{linears[name].in_features} inputs"
            )
        found[name] = _statistics(name, means, tokens, index)
    if not found:
        example = next(iter(entries), "nothing")
        raise EoraLabError(f"{path} is of another model: it holds {example} and knows none of this model's linears")
    return found


def write_imatrix(
    path: Path | str,
    statistics: Mapping[str, InputStatistics],
    model: nn.Module,
    dataset: str = "",
    chunks: int = 0,
    chunk_size: int = 0,
) -> int:
    """Write statistics of a model's linears as an imatrix. Returns how many tensors it holds.

    statistics: from `collect_statistics`. Where those of several linears are of one tensor (gate and up of an expert)
                they are the same.
    dataset, chunks, chunk_size: what they were measured on, how many sequences, tokens a sequence: kept in the file.
    Raises EoraLabError for a model type whose names in GGUF files are not known, and when there is nothing to write.
    """
    import gguf

    path = Path(path)
    sums: dict[str, dict[int, tuple[Tensor, float]]] = {}
    for name, places in _places(model).items():
        if name in statistics:
            one = statistics[name]
            tokens = float(one.tokens)
            for tensor, index in places:
                sums.setdefault(tensor, {})[index] = one.power.float().cpu() * tokens, tokens
    if not sums:
        raise EoraLabError(f"{path}: there are no statistics of this model's linears to write")

    def write(partial: Path) -> None:
        writer = gguf.GGUFWriter(partial, "")
        writer.kv_data[0].pop("general.architecture", None)  # llama-imatrix writes none
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for tensor, rows in sorted(sums.items()):
            width = len(next(iter(rows.values()))[0])
            count = max(rows) + 1
            values, tokens = np.zeros((count, width), np.float32), np.zeros((count, 1), np.float32)
            for index, (power, number) in rows.items():
                values[index], tokens[index] = power.numpy(), number
            writer.add_tensor(f"{tensor}{SUMS}", values)
            writer.add_tensor(f"{tensor}{COUNTS}", tokens)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(path, write)
    return len(sums)


def _places(model: nn.Module) -> dict[str, list[tuple[str, int]]]:
    """Module name -> tensors of a GGUF file that have its inputs, and which of their matrices it is."""
    names, fused = GgufNames(model), fused_linears(model)
    parts = {name: (parts, index) for each in fused for index, (name, parts) in enumerate(_zip(each))}
    places: dict[str, list[tuple[str, int]]] = {}
    for name in block_linears(model):
        several, index = parts.get(name, (None, 0))
        modules = [name] if several is None else [of_all_experts(part) for part, _ in several]
        found = [names.find(module) for module in modules]
        places[name] = [(f"{one}.weight", index) for one in found if one is not None]
    return places


def _zip(fused):
    return zip(fused.names(), fused.parts, strict=True)


def _statistics(name: str, means: Tensor, tokens: Tensor, index: int) -> InputStatistics:
    """Of one matrix of a tensor."""
    if tokens[index] > 0:
        return InputStatistics.from_power(means[index].contiguous(), int(tokens[index]), name)
    mean = (means * tokens[:, None]).sum(0) / tokens.sum().clamp_min(1)
    return InputStatistics.from_power(mean, 0, name)


def _read(path: Path) -> Entries:
    """What a file holds. Raises EoraLabError when it cannot be read, or is no imatrix."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise EoraLabError(f"cannot read {path}: {error.strerror}") from error
    entries = _read_gguf(path) if head == b"GGUF" else _read_dat(path)
    for tensor, (means, tokens) in entries.items():
        if not (means.isfinite().all() and tokens.isfinite().all() and (means >= 0).all() and (tokens >= 0).all()):
            raise EoraLabError(f"{path}: {tensor} has values that are no mean squares: measure it again")
    return entries


def _read_gguf(path: Path) -> Entries:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        kind = reader.fields["general.type"].contents() if "general.type" in reader.fields else None
        tensors = {one.name: np.array(one.data, np.float32) for one in reader.tensors if one.tensor_type.name == "F32"}
    except Exception as error:  # the reader raises whatever it stumbles over in a damaged file
        raise EoraLabError(f"cannot read {path} as an imatrix: {one_line(error)}") from error
    if kind != "imatrix":
        raise EoraLabError(
            f"{path} is no imatrix, but a GGUF file of type {kind or 'model'}: make one with llama-imatrix"
        )
    entries: Entries = {}
    for key, sums in tensors.items():
        if not key.endswith(SUMS):
            continue
        tensor = key.removesuffix(SUMS)
        if f"{tensor}{COUNTS}" not in tensors:
            raise EoraLabError(f"{path} lacks {tensor}{COUNTS}: copy it again")
        counts = torch.from_numpy(tensors[f"{tensor}{COUNTS}"].reshape(-1))
        values = torch.from_numpy(sums).reshape(-1, sums.shape[-1])
        if len(values) != len(counts):
            raise EoraLabError(f"{path}: {tensor} has {len(values)} rows of sums and {len(counts)} counts")
        entries[tensor] = values / counts.clamp_min(1)[:, None], counts
    return entries


def _read_dat(path: Path) -> Entries:
    """The older form; the matrices of experts are told apart by the model, and tokens are not in it."""
    entries: Entries = {}
    try:
        data = path.read_bytes()
        for tensor, chunks, values in _records(data):
            entries[tensor] = torch.from_numpy(values / max(chunks, 1))[None], torch.tensor([float(max(chunks, 0))])
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise EoraLabError(f"{path} is no imatrix, or damaged ({one_line(error)}): copy it again") from error
    return entries


def _records(data: bytes) -> Iterator[tuple[str, int, np.ndarray]]:
    """(tensor, chunks, sums) of the older form."""
    place = 0

    def take(size: int) -> bytes:
        nonlocal place
        if size < 0 or place + size > len(data):
            raise ValueError("it ends early")
        place += size
        return data[place - size : place]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    if not 0 < (count := number()) < 2**20:
        raise ValueError(f"it says that it has {count} entries")
    for _ in range(count):
        name = take(number()).decode()
        chunks, size = number(), number()
        yield name, chunks, np.frombuffer(take(4 * size), np.float32)
