"""What is said of a record of `kernels.bench --cpu`: its tables, and the rows of them that the README has."""

import pandas as pd

SHAPES = ((4096, 4096), (14336, 4096))
GROUP, RANK = 64, 64
LLAMA = f"llama.cpp, Q4_0, rank {RANK}"
MACHINE = "{:.0f} rounds on {:.0f} threads that read memory at {:.1f} GB/s"
LAYER = "| {N} x {K}, W{bits} | {{:.2f}} | {{:.0f}} | {{:.1f}} | {{:.0f}} % |"
MODEL = "| {dtype} | {{:.1f}} | {{:.1f}} | {{:.1f}} |"
PEER = "llama.cpp writes {:.1f}"


def layer_table(result: dict) -> pd.DataFrame:
    """Times in milliseconds, how many times as fast as unpacked tiles and dense float32, and the share of bandwidth."""
    table = pd.DataFrame(result["layers"])
    of_one = table.set_index("road").groupby(["layer", "bits", "rank"], sort=False)["median"]
    for road in ("tiles, float32", "dense, float32"):
        table[f"x {road}"] = of_one.transform(lambda times, road=road: times[road] / times).values
    table["of bandwidth"] = table["bytes"] / table["median"] / result["bandwidth"]
    table[["least", "median"]] *= 1e3
    return table.drop(columns="bytes")


def model_table(result: dict) -> pd.DataFrame:
    """Tokens a second, and how many times as fast as dense models."""
    table = pd.DataFrame(result["models"]).rename(columns={"least": "best"})
    table[["best", "median"]] = 1 / table[["best", "median"]]
    for dense in ("dense, float32", "dense, bfloat16"):
        table[f"x {dense}"] = table["median"] / table.set_index("model")["median"][dense]
    return table


def in_readme(result: dict) -> dict[str, list[float]]:
    """Words of the README -> the numbers in them."""
    found = {MACHINE: [result["rounds"], result["machine"]["threads"], result["bandwidth"] / 1e9]}
    layers = layer_table(result).set_index(["layer", "bits", "rank", "road"])
    for N, K in SHAPES:
        for bits in (4, 3):
            row = layers.loc[f"{N} x {K}", bits, RANK, "numba, float32"]
            numbers = [row[name] for name in ("median", "x tiles, float32", "x dense, float32", "of bandwidth")]
            found[LAYER.format(N=N, K=K, bits=bits)] = [*numbers[:3], 100 * numbers[3]]
    models = model_table(result).set_index("model")["median"]
    for dtype in ("float32", "bfloat16"):
        roads = (f"dense, {dtype}", *(f"W{bits}, rank {RANK}, numba, {dtype}" for bits in (4, 3)))
        found[MODEL.format(dtype=dtype)] = [models[road] for road in roads]
    return found | ({PEER: [models[LLAMA]]} if LLAMA in models else {})


LAYERS = [LAYER.format(N=N, K=K, bits=bits) for N, K in SHAPES for bits in (4, 3)]
MODELS = [MODEL.format(dtype=dtype) for dtype in ("float32", "bfloat16")]
WORDS = (MACHINE, *LAYERS, *MODELS, PEER)


def readme(result: dict) -> str:
    """The part of the README that follows from a record."""
    found = {words: words.format(*numbers) for words, numbers in in_readme(result).items()}
    name = result["machine"]["processor"].replace(" ", "-")
    layers, models = ("\n".join(found[words] for words in rows) for rows in (LAYERS, MODELS))
    peer = f" {found[PEER]}, with the same path beside Q4_0." if PEER in found else ""
    return f"""\
Medians of {found[MACHINE]}
([record](kernels/results/cpu/{name}.json)). One row of x in float32, with a path of rank {RANK}: milliseconds, how many
times as fast as unpacked tiles and as a dense layer, and the share of that bandwidth.

| out x in | ms | x tiles | x dense | bandwidth |
|---|---|---|---|---|
{layers}

SmolLM2-135M, tokens a second, W4 and W3 with rank {RANK}.{peer}

| | dense | W4 | W3 |
|---|---|---|---|
{models}
"""
