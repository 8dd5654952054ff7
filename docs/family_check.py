"""Take a small model of a family through the package as a user would, and hold every step against something else."""

import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from docs.family_record import Family
from docs.shrink import default_config, small_model
from eora_lab import EoraLabError, Recipe, Report, collect_statistics, compress_model, load_model, load_run
from eora_lab.errors import one_line
from eora_lab.formats.adapter_check import check_adapter
from eora_lab.formats.peft import read_files
from eora_lab.model.structure import decoder, matrices
from eora_lab.run.stored import run_factors, shapes_of
from tests.tiny import tiny_tokenizer, tiny_tokens

MAPPINGS = {
    "causal-lm": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
    "image-text-to-text": (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        transformers.AutoModelForImageTextToText,
    ),
}
BASES: dict[str, dict[str, Any]] = {"rtn": {"bits": 3}, "gptq": {"bits": 4}, "wanda": {"bits": 16, "sparsity": "2:4"}}
SAME = 1e-9  # relative squared error of float32 logits that are computed in another order
SAME_PRODUCT = 1e-4  # of the effect of an adapter, whose factors went through 16 bits
SAME_STEPS = 1e-6  # of logits with and without a cache
SAME_STATISTICS = 1e-3  # relative error of S
CALIBRATION, TEST, PROMPT = tiny_tokens(12, 48, seed=1), tiny_tokens(4, 48, seed=2), tiny_tokens(2, 12, seed=3)


class Wrong(Exception):
    """A number is not what it should be."""


class Subject:
    """A small model of a family in a folder, and what is seen of it."""

    def __init__(self, seen: Family, folder: Path):
        self.seen = seen
        self.folder = folder
        self.auto = MAPPINGS[seen.mapping][1]
        self.kind = self.auto  # after `build` the class itself, which config.json names
        self.reference = torch.empty(0)  # logits of transformers' own model (samples, tokens, vocabulary)
        self.report: Report | None = None  # of round to nearest with EoRA

    @property
    def saved(self) -> Path:
        return self.folder / "model"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def plain(self) -> Any:
        """The model as transformers loads it."""
        return self.kind.from_pretrained(self.saved, dtype=torch.float32).eval().requires_grad_(False)

    def loaded(self) -> Any:
        """The model as the package loads it."""
        return load_model(self.saved)[0]


def check(mapping: str, name: str, folder: Path) -> Family:
    """Everything that is seen of a family. The folder is for its files, and empty."""
    seen, started = Family(mapping, name), time.perf_counter()
    subject = Subject(seen, folder)
    try:
        build(subject)
    except Exception as error:
        seen.not_built = told(error)
    else:
        for step in (load, statistics, compress):
            if not seen.refused and not seen.errors:
                attempt(subject, step)
        if not seen.refused and subject.report:
            for step in (run_folder, adapter, generation, coverage):
                attempt(subject, step)
    seen.seconds = round(time.perf_counter() - started, 1)
    return seen


def attempt(subject: Subject, step: Callable[[Subject], None]) -> None:
    """Do a step and note how it ended."""
    seen, name = subject.seen, step.__name__.replace("_", " ")
    try:
        step(subject)
    except Wrong as error:
        seen.wrong[name] = str(error)
    except EoraLabError as error:
        if step is adapter:
            seen.no_adapter = one_line(error)
        elif step in (load, statistics, compress) and subject.report is None:
            seen.refused = one_line(error).replace(str(subject.saved), "it")
        else:
            seen.errors[name] = told(error)
    except Exception as error:
        seen.errors[name] = told(error)


def told(error: Exception) -> str:
    """An error in a line: its kind, its message, and the last place of the package that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "eora_lab" in Path(f.filename).parts]
    place = f" ({Path(frames[-1].filename).name}, {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{place}"


def build(subject: Subject) -> None:
    """Save a small model, and the logits that it gives on text alone."""
    seen = subject.seen
    config = default_config(seen.name)
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    seen.decoder_only = not (masked or config.is_encoder_decoder)
    model = small_model(config, subject.auto)
    subject.kind, seen.model = type(model), type(model).__name__
    before = logits(model, TEST)
    if before.shape[:2] != TEST.shape or not before.isfinite().all():
        raise ValueError("on text alone it gives no finite logits for every token")
    model.save_pretrained(subject.saved)
    tiny_tokenizer().save_pretrained(subject.saved)
    subject.reference = logits(subject.plain(), TEST)


def load(subject: Subject) -> None:
    """Logits of the loaded model against those of transformers' own."""
    different = distance(subject.reference, logits(subject.loaded(), TEST))
    if not different < SAME:
        raise Wrong(f"logits of the loaded model are off by {different:.1g}")


def statistics(subject: Subject) -> None:
    """S of every layer against the inputs that hooks see in plain forward passes."""
    model = subject.loaded()
    found = collect_statistics(model, CALIBRATION, progress=False)
    sums = {name: torch.zeros_like(one.second_moment) for name, one in found.items()}
    tokens = dict.fromkeys(found, 0)

    def watch(name: str) -> None:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name] += x.T @ x
            tokens[name] += len(x)

        model.get_submodule(name).register_forward_pre_hook(note)

    for name in found:
        watch(name)
    logits(model, CALIBRATION)
    for name, one in found.items():
        if one.tokens != tokens[name]:
            raise Wrong(f"{name}: {one.tokens} tokens, and {tokens[name]} in a plain pass")
        wanted, weight = sums[name], tokens[name]
        if pooled := one.pooled_tokens:  # an expert's S is drawn towards that of all of its mixture
            mixture = [other for other in found if alike(other) == alike(name)]
            every = sum(sums[other] for other in mixture) / sum(tokens[other] for other in mixture)
            wanted, weight = wanted + pooled * every, weight + pooled
        off = float((one.second_moment * weight - wanted).norm() / wanted.norm().clamp_min(1e-9))
        if not off < SAME_STATISTICS:
            raise Wrong(f"{name}: S is off by {off:.1g} from that of a plain pass")


def alike(name: str) -> str:
    """A layer's name without its last number, which tells one expert from another."""
    return re.sub(r"\.\d+(?!.*\.\d)", ".*", name)


def compress(subject: Subject) -> None:
    """Every base with EoRA against the same base without."""
    worse = []
    for compressor, settings in BASES.items():
        pair = []
        for method in ("none", "eora"):
            model = subject.loaded()
            recipe = Recipe(compressor, method=method, rank=8, group_size=32, **settings)
            folder = subject.run if (compressor, method) == ("rtn", "eora") else None
            report = compress_model(model, CALIBRATION, recipe, folder=folder, progress=False)
            after = logits(model, TEST)
            pair.append(distance(subject.reference, after))
            if folder:
                subject.report = report
                torch.save(after, subject.folder / "logits.pt")
        subject.seen.logits[compressor] = pair
        if not pair[1] < pair[0]:
            worse.append(f"{compressor}: logits are off by {pair[1]:.3g} with EoRA, {pair[0]:.3g} without")
    if worse:
        raise Wrong("; ".join(worse))


def run_folder(subject: Subject) -> None:
    """The model that a run folder gives against the one that was compressed, bit by bit."""
    before = torch.load(subject.folder / "logits.pt")
    again = logits(load_run(subject.run)[0], TEST)
    if not torch.equal(before, again):
        raise Wrong(f"logits of the run folder are off by {distance(before, again):.1g}")


def adapter(subject: Subject) -> None:
    """The run's adapter in peft, on transformers' own model, against B A added to the weights.

    What peft or the package refuses is no adapter, nor is what `adapter check` foresees; other differences are wrong.
    """
    import peft

    model = subject.loaded()
    for name, (A, B) in run_factors(subject.run).items():
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight + B.float() @ A.float())  # a new one: blocks may share the old
    try:
        wrapped = peft.PeftModel.from_pretrained(subject.plain(), subject.run / "adapter")
    except Exception as error:
        subject.seen.no_adapter = f"peft: {told(error)}"
        return
    wanted = logits(model, TEST)
    off = distance(wanted, logits(wrapped, TEST)) / distance(wanted, subject.reference)
    if not off < SAME_PRODUCT:
        findings = check_adapter(*read_files(subject.run / "adapter"), shapes_of(str(subject.run)), model)
        if not (foreseen := [str(finding) for finding in findings if finding.loader == "peft"]):
            raise Wrong(f"logits of peft's model are off by {off:.1g} of what the adapter changes")
        subject.seen.no_adapter = f"adapter check says {'; '.join(foreseen)}"


def generation(subject: Subject) -> None:
    """Logits while text is made, with and without a cache, against those of one pass over the text.

    The original is asked the same: what it cannot do either is noted only.
    """
    original, compressed = consistency(subject.plain()), consistency(load_run(subject.run)[0])
    for way, before in original.items():
        after = compressed[way]
        if isinstance(before, str) or before > SAME_STEPS:
            subject.seen.notes.append(f"generation {way}: the original model's own is inconsistent")
        elif isinstance(after, str) or after > SAME_STEPS:
            raise Wrong(f"{way}: {after}, and {before:.1g} for the original")


def consistency(model: Any) -> dict[str, float | str]:
    """With and without a cache -> `distance`, or what was raised."""
    found: dict[str, float | str] = {}
    for way, cache in (("with a cache", True), ("without a cache", False)):
        try:
            made = model.generate(
                input_ids=PROMPT,
                attention_mask=torch.ones_like(PROMPT),
                min_new_tokens=5,
                max_new_tokens=5,
                do_sample=False,
                use_cache=cache,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
            whole = logits(model, made.sequences)[:, PROMPT.shape[1] - 1 : -1]
            found[way] = distance(whole, torch.stack(made.logits, 1))
        except Exception as error:
            found[way] = told(error)
    return found


def coverage(subject: Subject) -> None:
    """How much of the decoder was compressed, by the report; at the size that the family has by default, if it can."""
    assert subject.report
    seen, left = subject.seen, subject.report.left or {}
    seen.coverage, seen.left = subject.report.coverage, sorted(left, key=lambda name: -left[name])
    if few := [layer.name for layer in subject.report.layers if layer.data_free]:
        seen.notes.append(f"{len(few)} layers saw too few tokens and were compressed without data")
    small = subject.plain()
    counted = matrices(small, decoder(small))
    if set(left) - set(counted):  # names that only the package's form of the model has
        return
    try:
        config = default_config(seen.name)
        with torch.device("meta"):
            whole = subject.auto.from_config(config)
    except Exception:  # a default may lack what `EXCEPTIONS` give
        return
    sizes = matrices(whole, decoder(whole))
    stays = {name: size * left.get(name, 0) / counted[name] for name, size in sizes.items() if name in counted}
    seen.whole, seen.coverage = True, 1 - sum(stays.values()) / sum(sizes[name] for name in stays)
    seen.left = sorted(filter(stays.get, stays), key=lambda name: -stays[name])


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """(samples, tokens, vocabulary) in one plain pass."""
    torch.manual_seed(0)
    return model(input_ids=tokens, use_cache=False).logits


def distance(reference: Tensor, other: Tensor) -> float:
    """Squared error of logits (samples, tokens, vocabulary), relative to the variance of the reference."""
    reference = reference.double()
    return float((other.double() - reference).square().mean() / reference.var(correction=0))
