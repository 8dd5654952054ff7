"""Importance matrices of llama.cpp: E[x²] of every input channel of every weight, as llama-imatrix measures them.

A GGUF file of type "imatrix" has for each tensor T of a model `T.in_sum2` (matrices, in), sums of x² over tokens, and
`T.counts` (matrices, 1), how many tokens; an expert is a matrix. The older form (.dat) has means times a number of
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

from eora_lab.calibrate.statistics import CHANNELS_A_TOKEN, InputStatistics
from eora_lab.errors import EoraLabError, one_line
from eora_lab.files import write_atomically
from eora_lab.formats.fused import fused_linears
from eora_lab.formats.gguf_names import GgufNames, of_all_experts
from eora_lab.model.structure import block_linears
from eora_lab.model.unfold import unfold

SUMS, COUNTS = ".in_sum2", ".counts"
DAT_CHUNK = 512  # tokens of a chunk, which the older form does not say: llama-imatrix's default
Entries = dict[str, tuple[Float[Tensor, "matrices in"], Float[Tensor, " matrices"]]]  # tensor -> (E[x²], tokens)


def read_imatrix(path: Path | str, model: nn.Module) -> dict[str, InputStatistics]:
    """Statistics of the linears of a model that a file knows: module name -> the diagonal of S.

    An expert that saw few tokens is drawn towards the mean of all experts of its layer, as if so many of their tokens
    were its own as it has inputs (see `eora_lab.calibrate.experts`).

    model: its experts are unfolded in place; without weights will do (`load_skeleton`).
    Raises EoraLabError when the file cannot be read or is of another model, and for a model type whose names in GGUF
    files are not known.
    """
    unfold(model)
    path, linears, places = Path(path), block_linears(model), _places(model)
    entries = _read(path)
    matrices: dict[str, int] = {}
    for several in places.values():
        for tensor, index in several:
            matrices[tensor] = max(index + 1, matrices.get(tensor, 0))
    found = {}
    for name, several in places.items():
        tensor, index = next(((tensor, index) for tensor, index in several if tensor in entries), ("", 0))
        if not tensor:
            continue
        (means, tokens), width = entries[tensor], linears[name].in_features
        if means.numel() != matrices[tensor] * width:
            raise EoraLabError(
                f"{path} is of another model: it has {means.numel()} values of {tensor}, and this one "
                f"{matrices[tensor]} x {width}"
            )
        found[name] = _statistics(name, means.view(-1, width), tokens.expand(matrices[tensor]), index)
    if not found:
        raise EoraLabError(f"{path} is of another model: it holds {next(iter(entries), 'nothing')}, which is not in it")
    return found


def write_imatrix(
    path: Path | str,
    statistics: Mapping[str, InputStatistics],
    model: nn.Module,
    dataset: str = "",
    chunks: int = 1,
    chunk_size: int = 0,
) -> int:
    """Write statistics of a model's linears as an imatrix. Returns how many tensors it holds.

    statistics: from `collect_statistics`. Where those of several linears are of one tensor (gate and up of an expert)
                they are the same.
    dataset, chunks, chunk_size: what they were measured on, how many sequences, tokens a sequence: kept in the file,
                which has to have them. Without a chunk_size, it is the number of tokens.
    Raises EoraLabError for a model type whose names in GGUF files are not known, and when there is nothing to write.
    """
    import gguf

    unfold(model)
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
        tokens_seen = max(int(tokens) for rows in sums.values() for _, tokens in rows.values())
        writer.add_uint32("imatrix.chunk_size", chunk_size or max(tokens_seen, 1))
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
    parts = {
        name: (parts, index)
        for each in fused
        for index, (name, parts) in enumerate(zip(each.names(), each.parts, strict=True))
    }
    places: dict[str, list[tuple[str, int]]] = {}
    for name in block_linears(model):
        several, index = parts.get(name, (None, 0))
        modules = [name] if several is None else [of_all_experts(part) for part, _ in several]
        found = [names.find(module) for module in modules]
        places[name] = [(f"{one}.weight", index) for one in found if one is not None]
    return places


def _statistics(
    name: str, means: Float[Tensor, "matrices in"], tokens: Float[Tensor, " matrices"], index: int
) -> InputStatistics:
    """Of one matrix of a tensor."""
    own, count, channels = means[index].contiguous(), float(tokens[index]), means.shape[1]
    pool = 0.0
    if len(means) > 1 and count < channels / CHANNELS_A_TOKEN:
        pool = min(float(channels), float(tokens.sum()))
        layer = (means * tokens[:, None]).sum(0) / tokens.sum().clamp_min(1)
        own = (count * own + pool * layer) / max(count + pool, 1.0)
    statistics = InputStatistics.from_power(own, int(count), name)
    statistics.pooled_tokens = pool
    return statistics


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
    """The older form: the matrices of experts lie in one row, and have one number of chunks."""
    entries: Entries = {}
    try:
        data = path.read_bytes()
        for tensor, chunks, values in _records(data):
            means, tokens = torch.from_numpy(values / max(chunks, 1)), float(max(chunks, 0) * DAT_CHUNK)
            entries[tensor] = means[None], torch.tensor([tokens])
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
