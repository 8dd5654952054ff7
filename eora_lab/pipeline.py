"""The pass: block by block, measure the inputs, compress the weights, compensate the error, move on.

One block's statistics are held at a time. Linears that share an input share its statistics.
"""

import hashlib
import time
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.blocks import BlockStream, decoder_blocks, linears
from eora_lab.compensate import solve
from eora_lab.compress.grid import ZeroPoint
from eora_lab.errors import EoraLabError
from eora_lab.linear import CompensatedLinear
from eora_lab.recipe import Recipe
from eora_lab.report import LayerReport, Report, peak_memory
from eora_lab.runs import RunFolder
from eora_lab.statistics import InputStatistics


@torch.no_grad()
def compress_model(
    model: nn.Module,
    batches: Int[Tensor, "nsamples seqlen"],
    compressor: str = "rtn",
    bits: int = 3,
    group_size: int = 64,
    method: str = "eora",
    rank: int = 64,
    inputs: str = "compensated",
    *,
    sym: bool = False,
    zero_point: ZeroPoint = "float",
    folder: Path | str | None = None,
    calibration: dict | None = None,
    statistics: dict[str, InputStatistics] | None = None,
    progress: bool = True,
) -> Report:
    """Compress every linear of the decoder blocks and put the compensated layers in place. Returns the report.

    Embeddings and lm_head stay as they are.

    batches:    calibration token ids.
    compressor ... inputs, sym, zero_point: see `Recipe`.
    folder:     keep the run there, and resume it from there if it was interrupted.
    calibration: how the batches were made (source, seed, ...), to be kept in the folder's config.json.
    statistics: of the original model, from `collect_statistics`; they replace the pass, so inputs must be "original".
    Raises EoraLabError before anything is changed when a setting does not fit the model, and on NaN or Inf in
    activations, with the layer's name.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    recipe = Recipe(compressor, bits, group_size, sym, zero_point, method, rank, inputs)
    recipe.check(model)
    if statistics is not None and inputs != "original":
        raise EoraLabError('statistics measured before are of the original model: pass inputs="original"')
    blocks = decoder_blocks(model)
    run = RunFolder(folder, asdict(recipe) | (calibration or {}) | identity(model, batches)) if folder else None
    stream = BlockStream(model, batches) if statistics is None else None
    report = Report()
    for index, (prefix, block) in enumerate(
        tqdm(blocks.items(), desc=compressor, unit="block", disable=not progress, leave=False)
    ):
        if run and run.has_block(index):
            if stream and inputs == "original":
                stream.advance(index)
            report.layers += run.load_block(index, model)
        else:
            found = stream.statistics(index, keep_outputs=inputs == "original") if stream else statistics
            modules, layers = {}, []
            for local in linears(block):
                name = f"{prefix}.{local}"
                if name not in found:
                    raise EoraLabError(f"{name}: no calibration token reached this layer")
                modules[name], layer = compress_linear(model, name, found[name], recipe)
                layers.append(layer)
            if run:
                run.save_block(index, modules, layers)
            report.layers += layers
        if stream and inputs == "compensated" and index + 1 < len(blocks):
            stream.advance(index)
    report.seconds = time.perf_counter() - started
    report.peak_memory = peak_memory(next(model.parameters()).device)
    if run:
        run.finish(report, model)
    return report


def compress_linear(
    model: nn.Module, name: str, statistics: InputStatistics, recipe: Recipe
) -> tuple[CompensatedLinear, LayerReport]:
    """Compress one linear, compensate it, and put it in place."""
    weight = model.get_submodule(name).weight.float()
    start = time.perf_counter()
    compressed = recipe.compress(weight, statistics)
    compressed_at = time.perf_counter()
    residual = weight - compressed.dense(model.dtype).float()
    low_rank = solve(recipe.method, residual, statistics, recipe.rank)
    solved_at = time.perf_counter()
    module = CompensatedLinear.replacing(model.get_submodule(name), compressed, low_rank)
    model.set_submodule(name, module)
    S = statistics.second_moment
    signal = output_energy(weight, S)
    left = residual - module.lora_B.float() @ module.lora_A.float()
    return module, LayerReport(
        name=name,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        rank=module.rank,
        error_before=output_energy(residual, S) / signal,
        error_after=output_energy(left, S) / signal,
        spectrum=spectrum_summary(low_rank.spectrum, module.rank),
        tokens=statistics.tokens,
        nbytes=module.nbytes,
        seconds_compress=compressed_at - start,
        seconds_solve=solved_at - compressed_at,
    )


def output_energy(matrix: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"]) -> float:
    """E|M x|² = tr(M S Mᵀ)."""
    return ((matrix @ second_moment) * matrix).sum().item()


def spectrum_summary(spectrum: Float[Tensor, " eigenvalues"], rank: int) -> dict[int, float]:
    """Share of the error energy that ranks 1, 2, 4, ... and `rank` remove."""
    total = spectrum.sum().item()
    ranks = sorted({2**k for k in range(16) if 2**k <= len(spectrum)} | ({rank} if rank else set()))
    return {r: spectrum[:r].sum().item() / total if total else 1.0 for r in ranks}


def identity(model: nn.Module, batches: Int[Tensor, "nsamples seqlen"]) -> dict[str, str]:
    """Which model and which tokens: what a resumed run must share with the interrupted one, beside its settings."""
    weights = hashlib.sha256()
    for block in decoder_blocks(model).values():
        for linear in linears(block).values():
            weights.update(linear.weight[0].float().cpu().numpy().tobytes())  # a row tells models apart
    return {
        "model": model.config.name_or_path,
        "dtype": str(model.dtype),
        "weights": weights.hexdigest(),
        "tokens": hashlib.sha256(batches.cpu().numpy().tobytes()).hexdigest(),
    }
