"""Time the packed layers on this machine's CPU beside dense ones, torch's int4 and llama.cpp: single layers of one row,
and SmolLM2-135M writing token by token.

All that is compared is timed in turns, in one run; a machine that is busy makes all of it slower.
"""

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from eora_lab.compensate.factors import StoredFactors
from eora_lab.compress import Compressed, GridWeight, rtn
from eora_lab.environment import environment
from eora_lab.errors import EoraLabError
from eora_lab.formats import write_gguf_adapter
from eora_lab.formats.gguf_file import write_gguf
from eora_lab.layer.head import quicken_head
from eora_lab.layer.linear import CompensatedLinear, use_backend
from eora_lab.measure.llama_cpp import LlamaCpp
from eora_lab.model.embedded import embedded_gguf
from eora_lab.model.load import load_model
from eora_lab.model.structure import block_linears
from kernels.cpu_tables import GROUP, LLAMA, RANK, SHAPES, layer_table, model_table, readme

PEERS = ("numba", "xllamacpp")  # packages whose versions matter, too
PAST_CACHE = 2**27  # bytes that turns of a layer's copies touch, more than the caches of most processors hold
COPIES = 40  # at most
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
PROMPT, TOKENS = "The low-rank path beside a compressed weight", 8
ROADS = {torch.float32: ("numba", "tiles"), torch.bfloat16: ("numba", "int4", "tiles")}


def in_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """name -> the least and the median of the seconds that its call reports."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(rounds + 1), leave=False):
        for name, call in calls.items():
            time.sleep(0.005)  # for the threads of the one before to rest
            seconds = call()
            if number:  # the first round warms up
                found[name].append(seconds)
    return {name: {"least": min(seconds), "median": statistics.median(seconds)} for name, seconds in found.items()}


def timed(call: Callable[[], object], count: int = 1) -> float:
    """Seconds of one of `count` calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def bandwidth() -> float:
    """Bytes a second that reading sustains."""
    source = torch.ones(2**28)
    return source.nbytes / min(timed(source.sum) for _ in range(10))


def random_layer(N: int, K: int, bits: int, rank: int, dtype: torch.dtype) -> CompensatedLinear:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (N, K), generator=generator, dtype=torch.uint8)
    scales = (0.5 + torch.rand(N, K // GROUP, generator=generator)) * 2**-bits / K**0.5
    weight = GridWeight(codes, scales, -scales * (2**bits - 1) / 2, bits, None, GROUP)
    old = nn.Linear(K, N, bias=False, dtype=dtype)
    return CompensatedLinear(old, weight, random_factors(N, K, rank, generator))


def random_factors(N: int, K: int, rank: int, generator: torch.Generator) -> StoredFactors:
    A, B = torch.randn(rank, K, generator=generator), torch.randn(N, rank, generator=generator)
    return StoredFactors((A / K**0.5).half(), (0.03 * B).half())


def turns(module: nn.Module, nbytes: int, x: Tensor, exact: Tensor | None) -> Callable[[], float]:
    """Seconds of a call of a module, over copies of it that pass the cache together. A wrong result is not timed."""
    with torch.no_grad():
        if exact is not None and not (error := (module(x) - exact).norm() / exact.norm()) <= TOLERANCE[x.dtype]:
            raise EoraLabError(f"{module} is wrong: relative error {error:.1e} against float64")
    modules = [module] + [copy.deepcopy(module) for _ in range(min(-(-PAST_CACHE // nbytes), COPIES) - 1)]

    def once() -> float:
        with torch.no_grad():
            return timed(lambda: [module(x) for module in modules]) / len(modules)

    return once


def time_layer(N: int, K: int, bits: int, rank: int, rounds: int) -> list[dict]:
    """Every road of a packed layer, and dense layers of its shape."""
    calls, sizes = {}, {}
    for dtype, roads in ROADS.items():
        layer = random_layer(N, K, bits, rank, dtype)
        x = torch.randn(1, K, generator=torch.Generator().manual_seed(1)).to(dtype)
        exact = F.linear(x.double(), layer.dense(torch.float64) + layer.lora_B.double() @ layer.lora_A.double())
        for road in roads:
            if road == "int4" and bits != 4:
                continue
            one = copy.deepcopy(layer)
            one.backend = road
            name = f"{road}, {str(dtype).removeprefix('torch.')}"
            sizes[name] = layer.compressed.nbytes + 2 * rank * (N + K)
            calls[name] = turns(one, sizes[name], x, exact)
        dense = nn.Linear(K, N, bias=False, dtype=dtype)
        name = f"dense, {str(dtype).removeprefix('torch.')}"
        sizes[name] = dense.weight.nbytes
        calls[name] = turns(dense, sizes[name], x, None)
    common = {"layer": f"{N} x {K}", "bits": bits, "rank": rank}
    return [common | {"road": name, "bytes": sizes[name]} | row for name, row in in_turns(calls, rounds).items()]


def pack(model: nn.Module, rank: int, **grid: object) -> nn.Module:
    """A copy of a model with its blocks' linears rounded to nearest, beside random paths, and the head of a run."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for name, linear in block_linears(model).items():
        weight: Compressed = rtn(linear.weight.detach().float(), None, **grid)
        factors = random_factors(*linear.weight.shape, rank, generator)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, CompensatedLinear(linear, weight, factors))
    quicken_head(model)
    return model


def write(model: nn.Module, ids: Tensor) -> float:
    """Seconds a token, greedily and with the keys and values of those before."""
    with torch.inference_mode():  # as `generate` has it
        output = model(ids, use_cache=True)
        start = time.perf_counter()
        for _ in range(TOKENS):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return (time.perf_counter() - start) / TOKENS


def llama_cpp(model: nn.Module, ids: list[int], folder: Path) -> Callable[[], float]:
    """Seconds a token of llama.cpp, with the weights of a model in Q4_0 and the path as its LoRA."""
    packed = pack(model, RANK, grid="q4_0", bits=None, group_size=None)
    write_gguf(folder / "base.gguf", packed, like=embedded_gguf())
    linears = {name: one for name, one in packed.named_modules() if isinstance(one, CompensatedLinear)}
    write_gguf_adapter(folder / "path.gguf", {name: one.factors.dense() for name, one in linears.items()}, packed)
    llama = LlamaCpp(folder / "base.gguf", folder / "path.gguf", window=64)

    def once() -> float:
        first = timed(lambda: llama.continue_greedily(ids, 1))
        return (timed(lambda: llama.continue_greedily(ids, 1 + TOKENS)) - first) / TOKENS

    return once


def time_model(rounds: int, folder: Path) -> list[dict]:
    """SmolLM2-135M, dense and packed, in float32 and bfloat16."""
    model, tokenizer = load_model("smollm2-135m")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    calls: dict[str, Callable[[], float]] = {}
    for dtype, roads in ROADS.items():
        kind, dense = str(dtype).removeprefix("torch."), copy.deepcopy(model).to(dtype)
        calls[f"dense, {kind}"] = lambda dense=dense: write(dense, ids)
        for bits, rank in ((4, RANK), (3, RANK), (4, 0)):
            packed = pack(dense, rank, bits=bits, group_size=GROUP)
            for road in roads if bits == 4 and rank else roads[:1]:
                one = copy.deepcopy(packed)
                use_backend(one, road)
                calls[f"W{bits}, rank {rank}, {road}, {kind}"] = lambda one=one: write(one, ids)
    try:
        calls[LLAMA] = llama_cpp(model, ids[0].tolist(), folder)
    except EoraLabError as error:
        print(f"without llama.cpp: {error}")
    return [{"model": name} | row for name, row in in_turns(calls, rounds).items()]


def bench_cpu(rounds: int) -> dict:
    """All of it, with a table after each part."""
    result = environment() | {"date": date.today().isoformat(), "rounds": rounds, "load": os.getloadavg()}
    result["versions"] |= {name: metadata.version(name) for name in PEERS if find_spec(name)}
    result["bandwidth"] = bandwidth()
    machine, load = result["machine"], ", ".join(f"{one:.1f}" for one in result["load"])
    print(
        f"{machine['processor']}, {machine['threads']} threads, reads {result['bandwidth'] / 1e9:.1f} GB/s, load {load}"
    )
    cases = [(*shape, bits, rank) for shape in SHAPES for bits, rank in ((4, RANK), (4, 0), (3, RANK), (3, 0))]
    result["layers"] = [row for case in tqdm(cases, desc="layers") for row in time_layer(*case, rounds)]
    print("", "Milliseconds of one row", layer_table(result).to_markdown(index=False, floatfmt=".3g"), sep="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        result["models"] = time_model(rounds, Path(folder))
    table = model_table(result).to_markdown(index=False, floatfmt=".3g")
    print("", "Tokens a second of SmolLM2-135M", table, "For the README:", readme(result), sep="\n\n")
    return result
