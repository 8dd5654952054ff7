"""The worked MMLU questions that lm-eval ships as prompts (flan_cot_fewshot): task text without a download.

Only the YAML files are read; lm-eval itself, which is slow to import, stays out.
"""

from importlib.util import find_spec
from pathlib import Path

from eora_lab.errors import EoraLabError

DEFAULT_SPLIT = "calibration"
JOIN = "\n\n"
PACKING = "examples"


def texts(split: str) -> list[str]:
    """Questions with their reasoning and answer: every third subject by name is "heldout", the others "calibration".

    Raises:
        EoraLabError: no such split, lm-eval is not installed, or this version of it has no such files.
    """
    return [f"Q: {sample['question'].strip()}\nA: {sample['target'].strip()}" for sample in samples(split)]


def samples(split: str) -> list[dict]:
    """The same as `question` (with its choices) and `target` (reasoning that ends in "The answer is (B).")."""
    if split not in ("calibration", "heldout"):
        raise EoraLabError(f"mmlu-exemplars has no split {split!r}; it has calibration and heldout")
    import yaml

    files = _subject_files()
    chosen = [file for i, file in enumerate(files) if (i % 3 == 2) == (split == "heldout")]
    subjects = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in chosen]
    return [sample for subject in subjects for sample in subject["fewshot_config"]["samples"]]


def _subject_files() -> list[Path]:
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EoraLabError('mmlu-exemplars needs lm-eval, which is not installed: pip install "eora-lab[eval]"')
    folder = Path(next(iter(spec.submodule_search_locations)), "tasks", "mmlu", "flan_cot_fewshot")
    files = sorted(folder.glob("mmlu_*.yaml"))
    if not files:
        raise EoraLabError(
            'the installed lm-eval has no worked MMLU questions; get one that does: pip install "eora-lab[eval]"'
        )
    return files
