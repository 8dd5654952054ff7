"""The measured numbers of README and guides on formats of other tools, and in llama.cpp."""

from collections.abc import Iterator

from docs.claim import Claim

IN_LLAMA_CPP = (("none", 0, ""), ("qera_approx", 64, "F16"))
IN_LLAMA_CPP += (("eora", 8, "F16"), ("eora", 16, "F16"), ("eora", 64, "F16"), ("eora", 64, "Q8_0"))
IN_LLAMA_CPP += (("reround", 0, ""),)


FILES = ("Q2_K", "IQ3_XXS", "Q3_K_S", "Q4_0", "Q4_K_S")
GRIDS = {"nf4": "NF4", "mxfp4": "MXFP4", "nvfp4": "NVFP4", "fp8": "FP8", "q4_0": "Q4_0", "q8_0": "Q8_0"}
MADE = (("none", 0), ("eora", 16), ("eora", 64))


def of_formats() -> Iterator[Claim]:
    for grid, name in GRIDS.items():
        yield Claim(
            f"| {name} grid | {{:.2f}} | {' | '.join(['{:.2f}'] * 6)} |",
            "formats",
            lambda known, grid=grid: (
                [known[grid, "rtn", "none", 0]["bits_per_weight"]]
                + [known[grid, by, *made]["perplexity.wikitext2:test"] for by in ("rtn", "gptq") for made in MADE]
            ),
        )

    yield Claim(
        "| bits of the path | | | {:.2f} | {:.2f} | | {:.2f} | {:.2f} |",
        "formats",
        lambda known: [
            known["q4_0", by, "eora", rank]["bits_per_weight"] - known["q4_0", by, "none", 0]["bits_per_weight"]
            for by in ("rtn", "gptq")
            for rank in (16, 64)
        ],
    )


def of_gguf() -> Iterator[Claim]:
    yield Claim("in float32, {:.2f}", "gguf", lambda known: [known["F32", "none", 0, ""]])
    for kind in FILES:
        made = [one for one in IN_LLAMA_CPP if one == ("none", 0, "") or kind != "Q4_K_S"]
        made = [one for one in made if one[0] != "reround" or not kind.startswith("IQ")]
        empty = " |" * (len(IN_LLAMA_CPP) - len(made))
        yield Claim(
            f"| {kind} | {{:.2f}} | {' | '.join(['{:.2f}'] * len(made))} |{empty}",
            "gguf",
            lambda known, kind=kind, made=made: (known[kind, "bits"], *(known[kind, *one] for one in made)),
        )
    yield Claim(
        f"| bits of the path | | | {' | '.join(['{:.2f}'] * 5)} | 0 |",
        "gguf",
        lambda known: [known[rank, factors, "bits"] for _, rank, factors in IN_LLAMA_CPP if rank],
    )
    yield Claim(
        "Q2_K with rank 16 takes {:.2f} bits and Q3_K_S alone {:.2f}, for {:.2f} against {:.2f}; IQ3_XXS with rank 16 "
        "({:.2f}) and Q3_K_S with rank 8 ({:.2f}) are at {:.2f} and {:.2f}.",
        "gguf",
        lambda known: (
            with_path(known, "Q2_K", 16),
            known["Q3_K_S", "bits"],
            known["Q2_K", "eora", 16, "F16"],
            known["Q3_K_S", "none", 0, ""],
            with_path(known, "IQ3_XXS", 16),
            with_path(known, "Q3_K_S", 8),
            known["IQ3_XXS", "eora", 16, "F16"],
            known["Q3_K_S", "eora", 8, "F16"],
        ),
    )
    yield Claim(
        "Q3_K_S with rank 16 ({:.2f}) or with rank 64 in Q8_0 ({:.2f})",
        "gguf",
        lambda known: (with_path(known, "Q3_K_S", 16), with_path(known, "Q3_K_S", 64, "Q8_0")),
    )
    for kind in FILES:
        yield Claim(
            f"| {kind}, 2 threads | {' | '.join(['{:.0f}'] * 5)} |",
            "gguf-speed",
            lambda known, kind=kind: (
                [known[kind, *one] for one in ((0, ""), (8, "F16"), (16, "F16"), (64, "F16"))]
                + [known[kind, 64, "Q8_0"]]
            ),
        )


def with_path(known: dict[tuple, float], kind: str, rank: int, factors: str = "F16") -> float:
    """Bits a weight of a file and the adapter beside it."""
    return known[kind, "bits"] + known[rank, factors, "bits"]
