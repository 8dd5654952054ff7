"""What a pass over a large model will cost, from its shapes alone: `python -m docs.predict`. Nothing of it is measured
on such a model: it is a prediction, from the sums below and from what a machine is assumed to reach. What Python and
small kernels take beside is not in it, so that it is rather a lower bound.

For every decoder block, with T calibration tokens, linears of m outputs and k inputs, ranks r, and t tokens that reach
a linear (T, or T a / E where a of E experts take each token):

    forward     2 passes of 2 t m k, and 4 T L d of attention (L tokens a sequence, d = heads x head size)
    statistics  t k² for every distinct input: half of S = X Xᵀ, in float32
    experts     2 k³ (9 products with k/8 columns, for 6 strengths, 2 halves and 8 experts): how far they are pooled
    compress    rtn: 10 times 4 m k bytes. gptq: m k² to move errors on, k³ in float64 for the factor of S^-1 (a linear
                whose input another one shares takes that one's), and 12 launches a column
    solve       a Krylov space of n = 48 s columns, s = max(10, 9 r / 96): s + 2 products of 96 (2 m k + k²), 4 m n² for
                its basis, 2 r m k for A, 10 n³ in float64 for eigenvalues, and 400 launches a step; where the layer is
                too small for it, 2 m k min(m, k) + 2 m k² and 10 min(m, k)³ in float64
    errors      m k² each for W S and (R - B A) S, of which half is multiplied
    files       2 m k bytes read, and what is stored written
    reduce      4 k² bytes for every distinct input, between GPUs

A second goes by for so many of these as the machine is assumed to do (`MACHINES`); `cpu` is this one, of which a core's
speed is measured in a moment. On several GPUs calibration texts are split evenly; linears go to the one that has least
to do, the longest first. `--against RUN` puts the seconds of a finished run beside those predicted for it.

Peak memory is that of one block on the GPU beside what `eora_lab.run.memory` says that a pass needs. The weights of the
other blocks are elsewhere; `--device cuda` holds all of them on the GPU as well (column `weights`).
"""

import argparse
import heapq
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from eora_lab.calibrate.contract import Contract
from eora_lab.calibrate.experts import experts_of
from eora_lab.compensate.krylov import BLOCK, dimensions
from eora_lab.model.load import load_skeleton
from eora_lab.model.structure import decoder_blocks, linears
from eora_lab.model.unfold import unfold
from eora_lab.products import fast_products
from eora_lab.run.folder import read_report, run_settings
from eora_lab.run.memory import ITERATIVE, needed, stored
from eora_lab.run.recipe import Recipe

SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"q_a_proj", "kv_a_proj_with_mqa"}, {"gate_proj", "up_proj"})
GB = 1e9
Cost = dict[str, float]  # what of `MACHINES` -> how much of it


@dataclass(frozen=True)
class Model:
    """A model as blocks of a few kinds. blocks: kind, the number of a block in `modules` -> how many there are."""

    modules: nn.Module  # without weights, one block or more of each kind
    blocks: dict[int, int]
    active: float = 1.0  # share of the experts that take a token

    @property
    def weights(self) -> float:
        """Bytes of all of them."""
        own = list(decoder_blocks(self.modules).values())
        whole = sum(p.numel() for p in self.modules.parameters()) - sum(p.numel() for b in own for p in b.parameters())
        each = [sum(p.numel() for p in block.parameters()) for block in own]
        size = next(self.modules.parameters()).dtype.itemsize
        return size * (whole + sum(each[kind] * count for kind, count in self.blocks.items()))


def llama(hidden: int, ffn: int, blocks: int, heads: int) -> Model:
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    return Model(skeleton(config), {0: blocks})


def qwen3_30b() -> Model:
    config = transformers.Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
    )  # fmt: skip
    return Model(skeleton(config), {0: 48}, 8 / 128)


def kimi_k2() -> Model:
    config = transformers.DeepseekV3Config(
        hidden_size=7168, num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=384, num_experts_per_tok=8,
        n_shared_experts=1, n_group=1, topk_group=1, moe_intermediate_size=2048, intermediate_size=18432,
        num_attention_heads=64, num_key_value_heads=64, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, vocab_size=163840,
    )  # fmt: skip
    return Model(skeleton(config), {0: 1, 1: 60}, 8 / 384)


MODELS: dict[str, Callable[[], Model]] = {
    "Llama-3-8B": lambda: llama(4096, 14336, 32, 32),
    "Llama-3-70B": lambda: llama(8192, 28672, 80, 64),
    "Qwen3-30B-A3B": qwen3_30b,
    "Kimi-K2 (1T)": kimi_k2,
}


def skeleton(config: transformers.PreTrainedConfig) -> nn.Module:
    """The modules of a model without weights, in bfloat16."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    unfold(model)
    return model


# What a machine does in a second: operations in the model's own type, in float32, in float64, in float64 eigenvalues;
# bytes of its memory, of what it has from the host, of its disk, of its links to others; launches of a kernel.
# H100 SXM: 40 % of 989 T, 60 % of 67 T and of 34 T, 60 % of 3.35 TB; H200 has 4.8 TB. The rest is what is usual.
H100 = {"model": 400e12, "float32": 40e12, "float64": 20e12, "eigen": 0.2e12, "memory": 2e12, "host": 25e9}
H100 |= {"disk": 2e9, "link": 300e9, "launches": 2e5}
MACHINES = {"h100": H100, "h200": H100 | {"memory": 2.9e12}}


@fast_products()
def this_cpu() -> dict[str, float]:
    """The same of one thread of this machine, in float32: the best of three tries each."""

    def rate(work: float, run: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return work / min(times)

    a = torch.rand(1024, 1024)
    b, small = a.double(), torch.eye(384, dtype=torch.float64)
    product = rate(2 * 1024**3, lambda: a @ a)
    found = {"model": product, "float32": product, "float64": rate(2 * 1024**3, lambda: b @ b)}
    found["eigen"] = rate(10 * 384**3, lambda: torch.linalg.eigh(small + b[:384, :384] + b[:384, :384].T))
    found |= {"memory": rate(8 * a.numel(), lambda: a + 1), "host": 5e9, "disk": 1e9, "link": 1e9, "launches": 4e5}
    return found


@dataclass(frozen=True)
class Pass:
    """What is done: by a recipe, with so many sequences of so many tokens."""

    recipe: Recipe
    nsamples: int
    seqlen: int

    @property
    def tokens(self) -> int:
        return self.nsamples * self.seqlen


def of_linear(linear: nn.Linear, recipe: Recipe) -> dict[str, Cost]:
    """Step -> what a linear takes once its statistics are there."""
    m, k = linear.weight.shape
    found: dict[str, Cost] = {"errors": {"float32": 2 * m * k**2}}
    found["compress"] = {"memory": 40 * m * k, "launches": 20}
    if recipe.compressor in ITERATIVE:
        found["compress"] |= {"float32": m * k**2, "float64": k**3, "launches": 12 * k}
    if recipe.method != "none":
        found["solve"] = of_solve(m, k, recipe.rank)
    found["files"] = {"host": 2 * m * k, "disk": stored(linear, recipe, given=False)}
    return found


def of_solve(m: int, k: int, rank: int) -> Cost:
    """What EoRA of a layer takes."""
    looks, small = dimensions(rank), min(m, k)
    if small < max(1024, looks[-1]):
        return {"float64": 2 * m * k * small + 2 * m * k**2, "eigen": 10 * small**3, "launches": 100}
    n = looks[0]
    steps = n // BLOCK
    products = (steps + 2) * 2 * BLOCK * (2 * m * k + k**2)
    return {"float32": products + 4 * m * n**2 + 2 * rank * m * k, "eigen": 10 * n**3, "launches": 400 * steps}


def inputs_of(block: nn.Module) -> dict[str, int]:
    """The first linear of each distinct input of a block -> its channels."""
    found: dict[str, int] = {}
    seen = set()
    for name, linear in linears(block).items():
        parent, _, last = name.rpartition(".")
        group = next((i for i, names in enumerate(SAME_INPUT) if last in names), last)
        if (parent, group) not in seen:
            found[name] = linear.in_features
        seen.add((parent, group))
    return found


def of_block(model: Model, kind: int, what: Pass) -> tuple[dict[str, Cost], list[dict[str, Cost]]]:
    """(Step -> what is split over GPUs with the texts; a list of the same for every linear) of a block."""
    block = list(decoder_blocks(model.modules).values())[kind]
    own, mixtures = linears(block), experts_of(block)
    routed = {name for names in mixtures for name in names}
    reach = {name: what.tokens * (model.active if name in routed else 1) for name in own}
    config = model.modules.config.get_text_config()  # type: ignore[operator, union-attr]
    size = getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
    passes = 1 if what.recipe.inputs == "original" else 2
    forward = passes * sum(2 * reach[name] * linear.weight.numel() for name, linear in own.items())
    forward += passes * 4 * what.tokens * what.seqlen * config.num_attention_heads * size
    inputs = inputs_of(block)
    statistics = sum(reach[name] * k**2 for name, k in inputs.items())
    drawn = sum(2 * own[names[0]].in_features ** 3 for names in mixtures)
    split = {
        "forward": {"model": forward, "launches": passes * 3 * len(own) * what.nsamples / 4},
        "statistics": {"float32": statistics, "launches": 10 * len(inputs) * what.nsamples / 4},
        "reduce": {"link": sum(4 * k**2 for k in inputs.values())},
        "experts": {"float32": drawn},
    }
    return split, [of_linear(linear, what.recipe) for linear in own.values()]


def seconds(cost: Cost, machine: dict[str, float]) -> float:
    """What a machine needs for it, one thing after the other."""
    return sum(amount / machine[kind] for kind, amount in cost.items())


def predicted(model: Model, what: Pass, machine: dict[str, float], devices: int = 1) -> dict[str, float]:
    """Step -> seconds of a whole pass."""
    found: dict[str, float] = defaultdict(float)
    for kind, count in model.blocks.items():
        split, own = of_block(model, kind, what)
        if devices == 1:
            del split["reduce"]
        for step, cost in split.items():
            found[step] += count * seconds(cost, machine) / (devices if step in ("forward", "statistics") else 1)
        each = [{step: seconds(cost, machine) for step, cost in one.items()} for one in own]
        busy = [(0.0, number) for number in range(devices)]
        mine: list[list[dict[str, float]]] = [[] for _ in range(devices)]
        for one in sorted(each, key=lambda one: -sum(one.values())):
            least, number = heapq.heappop(busy)
            mine[number].append(one)
            heapq.heappush(busy, (least + sum(one.values()), number))
        for one in mine[max(busy)[1]]:  # the others wait for this one
            for step, value in one.items():
                found[step] += count * value
    return dict(found)


def peak(model: Model, what: Pass, devices: int = 1) -> float:
    """Bytes on a GPU: the largest block, and what the pass needs beside it."""
    shared = {}
    for prefix, block in decoder_blocks(model.modules).items():
        own = inputs_of(block)
        for name in linears(block):
            parent, _, last = name.rpartition(".")
            group = next((names for names in SAME_INPUT if last in names), {last})
            shared[f"{prefix}.{name}"] = next(
                f"{prefix}.{first}" for first in own
                if first.rpartition(".")[0] == parent and first.rpartition(".")[2] in group
            )  # fmt: skip
    none = frozenset[str]()
    contract = Contract({}, none, none, none, none, shared)
    parts = needed(model.modules, what.recipe, contract, (-(-what.nsamples // devices), what.seqlen))
    largest = max(sum(p.nbytes for p in block.parameters()) for block in decoder_blocks(model.modules).values())
    return largest + sum(parts.values())


def of_run(folder: Path) -> tuple[Model, Pass, dict[str, float]]:
    """The model and the pass of a finished run, and the seconds of its steps."""
    settings = run_settings(folder)
    modules = load_skeleton(settings["model"]).to(getattr(torch, settings["dtype"].removeprefix("torch.")))
    known = {name: settings[name] for name in Recipe.__dataclass_fields__ if name in settings}
    what = Pass(Recipe(**known), settings["nsamples"], settings["seqlen"])
    return Model(modules, dict.fromkeys(range(len(decoder_blocks(modules))), 1)), what, read_report(folder).steps


def rows(what: Pass, machine: dict[str, float], devices: list[int]) -> Iterator[list[str]]:
    """The cells of the table, a row for each model and number of GPUs."""
    for name, make in MODELS.items():
        model = make()
        for count in devices:
            found = predicted(model, what, machine, count)
            steps = ("forward", "statistics", "compress", "solve", "errors", "files")
            rest = sum(found.values()) - sum(found.get(step, 0.0) for step in steps)
            cells = [f"{found.get(step, 0.0) / 60:.1f}" for step in steps] + [f"{rest / 60:.1f}"]
            memory = [f"{peak(model, what, count) / GB:.0f}", f"{model.weights / GB:.0f}"]
            yield [name, str(count), *cells, f"{sum(found.values()) / 60:.1f}", *memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="h100", choices=(*MACHINES, "cpu"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--compressor", default="rtn")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--against", type=Path, help="a finished run folder, made with one thread of this CPU")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.against:
        model, what, measured = of_run(asked.against)
        found = predicted(model, what, this_cpu())
        print("step,predicted,measured")
        for step in dict.fromkeys([*found, *measured]):
            print(f"{step},{found.get(step, 0.0):.1f},{measured.get(step, 0.0):.1f}")
        return
    machine = this_cpu() if asked.machine == "cpu" else MACHINES[asked.machine]
    what = Pass(Recipe(asked.compressor, bits=asked.bits, rank=asked.rank), asked.nsamples, asked.seqlen)
    print(f"Predicted, not measured: {what.recipe.base}, EoRA r{asked.rank}, {asked.nsamples} x {asked.seqlen} tokens, "
          f"minutes on {asked.machine}")  # fmt: skip
    names = ["model", "GPUs", "forward", "statistics", "compress", "solve", "errors", "files", "rest", "all"]
    form = "{:14} {:>4}" + " {:>10}" * 8 + " {:>8} {:>10}"
    print(form.format(*names, "peak GB", "weights GB"))
    for row in rows(what, machine, asked.gpus):
        print(form.format(*row), flush=True)


if __name__ == "__main__":
    main()
