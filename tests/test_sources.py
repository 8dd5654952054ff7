"""Sources: what each one's texts look like, where they are found, and what a user reads when they are not."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from eora_lab.errors import EoraLabError
from eora_lab.text.sources import SOURCES
from eora_lab.text.tokens import calibration_batches, token_windows
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SHARED_MIRROR = Path(__file__).resolve().parents[2] / "shared" / "data"


def write_split(root: Path, folder: str, split: str, rows: list[dict]) -> None:
    """One split of a mirror, in two files, so that their order matters."""
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    half = len(rows) // 2
    for i, part in enumerate((rows[:half], rows[half:])):
        table = pyarrow.Table.from_pylist(part, schema=pyarrow.Table.from_pylist(rows).schema)
        pyarrow.parquet.write_table(table, path / f"{split}-0000{i}-of-00002.parquet")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """An empty mirror, and no way out to the hub."""
    monkeypatch.setenv("EORA_LAB_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def shared_mirror(monkeypatch):
    root = os.environ.get("EORA_LAB_DATA") or SHARED_MIRROR
    if not Path(root).is_dir():
        pytest.skip("no mirror of the public datasets here: set EORA_LAB_DATA")
    monkeypatch.setenv("EORA_LAB_DATA", str(root))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# --- embedded sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pydoc", "mmlu-exemplars"])
def test_embedded_splits_share_no_paragraph(name):
    if name == "mmlu-exemplars":
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    calibration, heldout = (SOURCES[name].texts(split) for split in ("calibration", "heldout"))
    size = [sum(map(len, texts)) for texts in (calibration, heldout)]
    assert 1.5 < size[0] / size[1] < 3
    whole = " ".join(" ".join(calibration).split())
    paragraphs = [" ".join(paragraph.split()) for text in heldout for paragraph in text.split("\n\n")]
    assert not [paragraph for paragraph in paragraphs if len(paragraph) >= 60 and paragraph in whole]


@pytest.mark.parametrize("source", ["pydoc", "pydoc:heldout", "mmlu-exemplars", "mmlu-exemplars:heldout"])
def test_embedded_sources_need_no_network(source, monkeypatch):
    if source.startswith("mmlu"):
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert calibration_batches(TOKENIZER, source, 4, 256).shape == (4, 256)


def test_exemplars_without_lm_eval_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EoraLabError, match=r'pip install "eora-lab\[eval\]"'):
        calibration_batches(TOKENIZER, "mmlu-exemplars", 1, 8)


# --- public datasets, from a mirror --------------------------------------------------------------------------------


def test_wikitext_keeps_its_lines(mirror):
    rows = [{"text": line} for line in ["", " = Title = ", "one <unk> two", ""]]
    write_split(mirror, "Salesforce/wikitext/wikitext-2-v1", "test", rows)
    text = "\n\n = Title = \n\none unk two\n\n"
    windows = token_windows(TOKENIZER, "wikitext2:test", seqlen=len(text))
    assert TOKENIZER.batch_decode(windows) == [text]
    write_split(mirror, "Salesforce/wikitext/wikitext-2-raw-v1", "test", [{"text": "raw"}, {"text": "text"}])
    assert TOKENIZER.decode(token_windows(TOKENIZER, "wikitext2:test", 1, 9)[0]) == "raw\n\ntext"


def test_task_formats(mirror):
    arc = {"question": "Why?", "choices": {"text": ["No", "Yes"], "label": ["1", "2"]}, "answerKey": "2"}
    write_split(mirror, "allenai/ai2_arc/ARC-Easy", "train", [arc])
    write_split(mirror, "allenai/ai2_arc/ARC-Challenge", "train", [arc | {"question": "How?", "answerKey": "1"}])
    assert SOURCES["arc"].texts("train") == ["Why? Yes.", "How? No."]

    write_split(mirror, "openai/gsm8k/main", "train", [{"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}])
    assert SOURCES["gsm8k"].texts("train") == ["Question: 1+1?\nAnswer: <<1+1=2>>2\n#### 2"]

    for subject, answer in (("botany", 2), ("anatomy", 0)):
        row = {"question": f" {subject}? ", "choices": list("wxyz"), "answer": answer}
        write_split(mirror, f"cais/mmlu/{subject}", "dev", [row])
    assert SOURCES["mmlu"].texts("dev") == [
        "anatomy?\nA. w\nB. x\nC. y\nD. z\nAnswer: A",
        "botany?\nA. w\nB. x\nC. y\nD. z\nAnswer: C",
    ]


@pytest.mark.parametrize(
    ("options", "answer"),
    [("a ) 38 , b ) 27.675 , c ) none of these", "27.675"), ("['a ) 38', 'b ) rs . 5', 'c ) 3']", "rs . 5")],
)
def test_mathqa_answers_with_the_rationale_or_the_choice(mirror, options, answer):
    row = {"Problem": "how much ?", "options": options, "correct": "b"}
    write_split(mirror, "allenai/math_qa/default", "test", [row])
    question = f"Question: how much ? Choices: {options}."
    assert SOURCES["mathqa"].texts("test") == [f"{question} Answer: b ) {answer}."]
    write_split(mirror, "allenai/math_qa/default", "train", [row | {"Rationale": "so it is"}])
    assert SOURCES["mathqa"].texts("train") == [f"{question} Rationale: so it is."]


def test_task_sequences_are_whole_examples_used_once(mirror):
    rows = [{"question": f"number {i}", "answer": str(i)} for i in range(40)]
    write_split(mirror, "openai/gsm8k/main", "train", rows)
    batches = calibration_batches(TOKENIZER, "gsm8k", 6, 100)
    asked = [
        piece.split("\n")[0]
        for text in TOKENIZER.batch_decode(batches)
        for piece in text.split("\n\n")[:-1]  # the last is cut
    ]
    assert all(question.startswith("Question: number ") for question in asked)
    assert len(asked) == len(set(asked)) > 12
    assert torch.equal(batches, calibration_batches(TOKENIZER, "gsm8k", 6, 100))
    assert not torch.equal(batches, calibration_batches(TOKENIZER, "gsm8k", 6, 100, seed=1))


def test_c4_takes_one_window_from_each_long_document(mirror):
    documents = ["short"] * 10 + [letter * 64 for letter in "abc"]
    write_split(mirror, "allenai/c4/en", "train", [{"text": document} for document in documents])
    texts = TOKENIZER.batch_decode(calibration_batches(TOKENIZER, "c4", 3, 32))
    assert sorted(texts) == [letter * 32 for letter in "abc"]
    with pytest.raises(EoraLabError, match="3 documents longer than 32 tokens, not 4"):
        calibration_batches(TOKENIZER, "c4", 4, 32)


def test_design_tables_text(shared_mirror):
    windows = token_windows(TOKENIZER, "wikitext2:validation", n=32, seqlen=512)
    assert windows.shape == (32, 512)
    assert TOKENIZER.decode(windows[0]).startswith("\n\n = Homarus gammarus = \n\n\n\n\n Homarus")


@pytest.mark.parametrize("source", ["arc", "gsm8k", "mmlu", "mathqa:test", "arc+gsm8k+mmlu"])
def test_tasks_from_the_shared_mirror(shared_mirror, source):
    batches = calibration_batches(TOKENIZER, source, 8, 512)
    assert batches.shape == (8, 512)
    assert len(batches.unique(dim=0)) == 8


# --- missing or damaged data ------------------------------------------------------------------------------------------


def test_too_few_examples(mirror):
    write_split(mirror, "openai/gsm8k/main", "train", [{"question": "q", "answer": "a"}] * 10)
    with pytest.raises(EoraLabError, match="the 10 examples of gsm8k fill 3 sequences of 64 tokens, not 4"):
        calibration_batches(TOKENIZER, "gsm8k", 4, 64)
    with pytest.raises(EoraLabError, match="228 tokens, one window needs 512"):
        calibration_batches(TOKENIZER, "gsm8k", 4, 512)


@pytest.mark.parametrize("name", ["wikitext2", "c4", "arc", "mathqa", "gsm8k", "mmlu"])
def test_a_missing_dataset_names_both_ways(mirror, name):
    with pytest.raises(EoraLabError) as error:
        calibration_batches(TOKENIZER, name, 1, 8)
    message = str(error.value)
    assert "\n" not in message
    assert all(words in message for words in ("config ", "split ", "set EORA_LAB_DATA", "network access to the hub"))


def test_a_missing_split_names_those_there(mirror):
    for split in ("test", "validation"):
        write_split(mirror, "Salesforce/wikitext/wikitext-2-v1", split, [{"text": "words"}])
    with pytest.raises(EoraLabError, match=r"Salesforce/wikitext .* split train\).* only the splits test, validation"):
        calibration_batches(TOKENIZER, "wikitext2", 1, 2)


def test_a_wrong_mirror_is_named(mirror, monkeypatch):
    monkeypatch.setenv("EORA_LAB_DATA", str(mirror / "nowhere"))
    with pytest.raises(EoraLabError, match="nowhere, which is not a folder"):
        calibration_batches(TOKENIZER, "arc", 1, 8)
    monkeypatch.delenv("EORA_LAB_DATA")
    with pytest.raises(EoraLabError, match="EORA_LAB_DATA is not set"):
        calibration_batches(TOKENIZER, "arc", 1, 8)


def test_a_damaged_mirror_is_named(mirror):
    write_split(mirror, "openai/gsm8k/main", "train", [{"question": "q", "reply": "a"}])
    with pytest.raises(EoraLabError, match=r"openai/gsm8k .* lacks the column answer"):
        calibration_batches(TOKENIZER, "gsm8k", 1, 8)
    for file in (mirror / "openai/gsm8k/main").iterdir():
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(EoraLabError, match=r"cannot read .*fetch its files again"):
        calibration_batches(TOKENIZER, "gsm8k", 1, 8)


ARC = {"question": "Why?", "choices": {"text": ["No", "Yes"], "label": ["A", "B"]}, "answerKey": "B"}
MMLU = {"question": "Why?", "choices": list("wxyz"), "answer": 2}


@pytest.mark.parametrize(
    ("name", "folder", "good", "change", "message"),
    [
        ("wikitext2", "Salesforce/wikitext/wikitext-2-v1", {"text": "a"}, {"text": None}, "text is null, not text"),
        ("c4", "allenai/c4/en", {"text": "a"}, {"text": None}, "text is null, not text"),
        ("gsm8k", "openai/gsm8k/main", {"question": "q", "answer": "a"}, {"answer": None}, "answer is null, not text"),
        ("arc", "allenai/ai2_arc/ARC-Easy", ARC, {"answerKey": "E"}, r"labels \['A', 'B'\], and the answer 'E'"),
        (
            *("arc", "allenai/ai2_arc/ARC-Easy", ARC, {"choices": {"text": ["No"], "label": ["A", "B"]}}),
            "1 choices with the labels",
        ),
        (
            *("arc", "allenai/ai2_arc/ARC-Easy", ARC, {"choices": {"text": ["No", None], "label": ["A", "B"]}}),
            "the answer is null",
        ),
        ("arc", "allenai/ai2_arc/ARC-Easy", ARC, {"choices": None}, "choices is null, not an object"),
        ("mmlu", "cais/mmlu/all", MMLU, {"answer": 4}, "4 choices and the answer 4, not 4 and one of 0 to 3"),
        ("mmlu", "cais/mmlu/all", MMLU, {"choices": ["x"]}, "1 choices and the answer 2"),
        (
            *("mathqa", "allenai/math_qa/default", {"Problem": "p", "options": "a ) 1", "correct": "a"}),
            *({"options": None}, "options is null, not text"),
        ),
    ],
)
def test_a_row_that_holds_something_else_is_named(mirror, name, folder, good, change, message):
    split = SOURCES[name].DEFAULT_SPLIT
    write_split(mirror, folder, split, [good, good, good, good | change])
    if name == "arc":
        write_split(mirror, "allenai/ai2_arc/ARC-Challenge", split, [good])
    place = f"row 2 of .*{folder}/{split}-00001-of-00002.parquet: "
    with pytest.raises(EoraLabError, match=f"{place}.*{message}") as error:
        calibration_batches(TOKENIZER, name, 1, 1)
    assert "\n" not in str(error.value)


def test_columns_of_another_type_are_named(mirror):
    write_split(mirror, "Salesforce/wikitext/wikitext-2-v1", "train", [{"text": 7}, {"text": 8}])
    with pytest.raises(EoraLabError, match=r"row 1 of .*text is 7, not text"):
        calibration_batches(TOKENIZER, "wikitext2", 1, 8)
    write_split(mirror, "allenai/ai2_arc/ARC-Easy", "train", [ARC | {"choices": "No, Yes"}])
    with pytest.raises(EoraLabError, match=r"row 1 of .*choices is 'No, Yes', not an object"):
        calibration_batches(TOKENIZER, "arc", 1, 8)


def test_a_closed_network_fails_fast(tmp_path):
    """A hub that refuses the connection; load_dataset alone tries for 24 s."""
    code = (
        "import time, eora_lab.errors, eora_lab.text.sources.gsm8k as source, datasets\n"
        "start = time.monotonic()\n"
        "try: source.texts('train')\n"
        "except eora_lab.errors.EoraLabError as error: print(time.monotonic() - start, error)"
    )
    refused = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    environment = {k: v for k, v in os.environ.items() if k not in ("EORA_LAB_DATA", "HF_HUB_OFFLINE")} | refused
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds, message = run.stdout.split(maxsplit=1)
    assert float(seconds) < 10 and "set EORA_LAB_DATA" in message
