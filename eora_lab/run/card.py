"""The card beside an adapter (README.md): what it belongs to, what was measured, and how to run it.

Everything in it is from the run that made the adapter; what was not measured is not there.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path

from eora_lab.environment import versions
from eora_lab.files import write_atomically
from eora_lab.formats.adapter_check import check_adapter
from eora_lab.formats.fused import Shapes
from eora_lab.formats.loaders import LOADERS
from eora_lab.formats.made_for import CARD, MadeFor
from eora_lab.formats.peft import read_files, served_rank
from eora_lab.run.report import STATES, Report

GGUF = """llama-server -m BASE.gguf --lora ADAPTER
curl localhost:8080/completion -d '{"prompt": "The capital of France is", "n_predict": 16}'"""
MLX = """mlx_lm.generate --model BASE --adapter-path ADAPTER --prompt "The capital of France is"
mlx_lm.server --model BASE --adapter-path ADAPTER"""


def write_card(path: Path, text: str) -> None:
    """Write a card."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def card_text(settings: Mapping, report: Report, made_for: MadeFor, serving: Mapping[str, str]) -> str:
    """What a card says.

    settings: of the run. made_for: the weights that the adapter belongs to. serving: tool -> how to run it.
    """
    model, checkpoint = str(settings.get("model", "")), settings.get("checkpoint")
    ranks = sorted({layer.rank for layer in report.layers})
    shares = any(layer.A_of for layer in report.layers)
    facts = {
        "made from": f"{model or 'a model in memory'}, SHA-256 of its weights {made_for.base or 'not known'}",
        "compressed": f"{report.base}, SHA-256 of the compressed weights {made_for.weights}",
        "checkpoint": checkpoint
        and f"{Path(checkpoint).name}, SHA-256 {settings.get('checkpoint_sha256', 'not known')}",
        "low-rank path": f"{settings.get('method')}, rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}",
        "lora_A": shares and "the same for layers that read one input, and repeated here for each",
        "statistics": _statistics(settings),
        "written by": f"EoRA Lab {versions()['eora-lab']}",
    }
    before, after = (
        _mean([getattr(layer, f"error_{when}") for layer in report.layers]) for when in ("before", "after")
    )
    lines = [
        *_front_matter(model),
        f"# Low-rank adapter for {Path(model).name or 'a model in memory'}, {report.base}",
        "",
        "It makes up for a part of what compression changed. It belongs to these compressed weights and to no others.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items() if value),
        "",
        "## What was measured",
        "",
        f"Relative output error, mean of {len(report.layers)} layers, on the texts of the statistics: {before:.5f} "
        f"without the adapter, {after:.5f} with it.",
        "",
    ]
    for text in report.losses:
        lines += _perplexity(report, text)
    if not report.losses:
        lines.append("Perplexity was not measured.")
    lines += ["", "## How to run it", "", f"ADAPTER is what this text lies beside; BASE is {_base(settings)}.", ""]
    for tool, commands in serving.items():
        lines += [f"{tool}:", "", *(f"    {line}" for line in commands.splitlines()), ""]
    if not serving:
        lines += ["No tool takes this form as it is: `eora-lab adapter check` says why.", ""]
    return "\n".join(lines).rstrip() + "\n"


def peft_serving(folder: Path, shapes: Shapes, model, original: str) -> dict[str, str]:
    """Tool -> how to run it, for the tools that load the PEFT adapter of a folder as meant.

    shapes, model: as for `check_adapter`. original: the model that the adapter's base was made from.
    """
    tensors, config = read_files(folder)
    wrong = {finding.loader for finding in check_adapter(tensors, config, shapes, model)}
    rank = max([config["r"], *config["rank_pattern"].values()])
    found = {}
    for name, loader in LOADERS.items():
        if not wrong & {name, "any"}:
            text = loader.serve.replace("RANK", str(rank)).replace("ORIGINAL", original or "ORIGINAL")
            found[loader.title] = text.replace("SERVED", str(served_rank(rank))) if "SERVED" in text else text
    return found


def write_peft_card(folder: Path, settings: Mapping, report: Report, made_for: MadeFor, model) -> None:
    """The card of the PEFT adapter in a folder. model: the modules that it belongs to, or None."""
    shapes = {layer.name: (layer.out_features, layer.in_features) for layer in report.layers}
    serving = peft_serving(folder, shapes, model, str(settings.get("model", "")))
    write_card(folder / CARD, card_text(settings, report, made_for, serving))


def _front_matter(model: str) -> list[str]:
    """What a hub reads of a card; nothing where the base model is none of a hub."""
    if model.count("/") != 1 or Path(model).expanduser().exists():
        return []
    return ["---", f"base_model: {model}", "tags:", "- lora", "- eora", "---", ""]


def _perplexity(report: Report, text: str) -> list[str]:
    """Of all states, beside the original and beside the compressed model alone."""
    found, windows = report.perplexity[text], len(report.losses[text]["dense"])
    how = f"{windows} windows, with paired 95 % intervals over them" if windows > 1 else "without intervals"
    lines = [f"Perplexity on {text}, {how}:", ""]
    for state in filter(found.__contains__, STATES):
        beside = {"dense": "the original's"} if state != "dense" else {}
        beside |= {"bare": "that without it"} if state == "compressed" and "bare" in found else {}
        ratios = [(report.ratio(text, state, to), whose) for to, whose in beside.items()]
        times = ", ".join(f"{ratio} times {whose}" for ratio, whose in ratios if ratio)
        lines.append(f"- {STATES[state]} {found[state]:.2f}" + (f": {times}" if times else ""))
    return [*lines, ""]


def _statistics(settings: Mapping) -> str:
    if settings.get("imatrix"):
        return f"mean squares of {Path(settings['imatrix']).name} (imatrix)"
    if "source" not in settings:
        return ""
    return f"{settings['source']}, {settings.get('nsamples')} sequences of {settings.get('seqlen')} tokens"


def _base(settings: Mapping) -> str:
    if settings.get("checkpoint") and not settings.get("reround"):  # other codes: the file that was mended will not do
        return f"the compressed model, {Path(settings['checkpoint']).name}"
    export = shlex.join(["eora-lab", "export", "RUN", "BASE", "--format", "gptq_v2"])
    return f"the compressed model, which `{export}` (or another format) writes from the run"


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)
