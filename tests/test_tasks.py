"""lm-eval on tiny models, offline, from a mirror made here; intervals between two models."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from eora_lab import EoraLabError, perplexity
from eora_lab.cli import main
from eora_lab.measure.evaluate import window_losses
from eora_lab.measure.own_tasks import exemplar_questions, rouge_lsum
from eora_lab.run.intervals import paired_bootstrap
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is the extra `eval`")
from eora_lab.measure.tasks import TaskResult, compare_results, evaluate_tasks


def write(root, path: str, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Made-up questions in the layout of the hub; as in real mirrors, some splits are missing."""
    monkeypatch.setenv("EORA_LAB_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def arc(n: int) -> list[dict]:
        choices = {"text": ["one", "two", "six", "ten"], "label": list("ABCD")}
        return [
            {"id": str(i), "question": f"Which is {i}?", "choices": choices, "answerKey": "ABCD"[i % 4]}
            for i in range(n)
        ]

    write(tmp_path, "allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet", arc(12))
    write(tmp_path, "allenai/ai2_arc/ARC-Easy/train-00000-of-00001.parquet", arc(5))
    write(tmp_path, "allenai/ai2_arc/ARC-Challenge/test-00000-of-00001.parquet", arc(7))
    problems = [
        {"Problem": f"{i} + 1", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "b"} for i in range(4)
    ]
    write(tmp_path, "allenai/math_qa/default/test-00000-of-00001.parquet", problems)
    sums = [{"question": f"{i} plus 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(8)]
    write(tmp_path, "openai/gsm8k/main/test-00000-of-00001.parquet", sums[:3])
    write(tmp_path, "openai/gsm8k/main/train-00000-of-00001.parquet", sums)
    news = [{"article": f"Cat {i} sat.", "highlights": "A cat sat .", "id": str(i)} for i in range(2)]
    write(tmp_path, "abisee/cnn_dailymail/3.0.0/test-00000-of-00001.parquet", news)
    return tmp_path


def margins_by_hand(model, tokenizer, questions: list[tuple[str, list[str], int]]) -> list[float]:
    """Total log-probability of the right choice after its prompt, minus that of the best wrong one."""
    margins = []
    for prompt, choices, answer in questions:
        totals = []
        for choice in choices:
            context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            whole = tokenizer(f"{prompt} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            totals.append(sum(logits[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        margins.append(totals.pop(answer) - max(totals))
    return margins


def test_multiple_choice_is_what_a_hand_count_says(mirror):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result = evaluate_tasks(model, tokenizer, ["arc_easy"])["arc_easy"]
    choices = ["one", "two", "six", "ten"]
    questions = [(f"Question: Which is {i}?\nAnswer:", choices, i % 4) for i in range(12)]
    margins = margins_by_hand(model, tokenizer, questions)
    by_hand = [float(margin > 0) for margin in margins]
    assert result.margins == pytest.approx(margins, abs=1e-4)
    assert result.margin == pytest.approx((np.mean(margins), np.std(margins, ddof=1) / 12**0.5), abs=1e-4)
    assert result.outcomes == by_hand and result.metric == "acc" and result.num_fewshot == 0
    assert result.value == pytest.approx(np.mean(by_hand))
    assert result.stderr == pytest.approx(np.std(by_hand, ddof=1) / 12**0.5)
    assert result.chance == 0.25 and len(set(result.questions)) == 12


def test_tasks_of_the_paper_run_offline_from_the_mirror(mirror):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.config.max_position_embeddings = 2048  # gsm8k writes 256 tokens after its five examples
    names = ["ai2_arc", "mathqa", "gsm8k", "cnn_dailymail", "exemplars"]
    results = evaluate_tasks(model, tokenizer, names, limit=3)
    assert list(results) == names
    assert {name: len(result.outcomes) for name, result in results.items()} == {
        "ai2_arc": 6, "mathqa": 3, "gsm8k": 3, "cnn_dailymail": 2, "exemplars": 3,
    }  # fmt: skip
    assert set(results["ai2_arc"].parts) == {"arc_easy", "arc_challenge"}
    assert {name: len(result.margins) for name, result in results.items()} == {
        "ai2_arc": 6, "mathqa": 3, "gsm8k": 0, "cnn_dailymail": 0, "exemplars": 3,
    }  # fmt: skip
    for name in ("ai2_arc", "mathqa", "exemplars"):
        assert [float(margin > 0) for margin in results[name].margins] == results[name].outcomes
    assert results["mathqa"].chance == pytest.approx(0.2)
    assert (results["gsm8k"].metric, results["gsm8k"].num_fewshot, results["gsm8k"].chance) == ("exact_match", 5, None)
    assert results["cnn_dailymail"].metric == "rougeLsum"


def test_examples_come_before_a_question_when_asked_for(mirror):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    shots = [evaluate_tasks(model, tokenizer, ["arc_easy"], 4, n)["arc_easy"] for n in (0, 2, 2)]
    assert [result.num_fewshot for result in shots] == [0, 2, 2]
    assert shots[1] == shots[2]
    with pytest.raises(EoraLabError, match="not answer the same"):
        compare_results(shots[0], shots[1])


@pytest.mark.parametrize(
    ("task", "shots", "message"),
    [
        ("arc_eazy", None, "did you mean arc_easy"),
        ("mathqa", 2, "no train split of allenai/math_qa"),
        ("hellaswag", None, "no data for the task hellaswag: .*EORA_LAB_DATA"),
    ],
)
def test_what_is_missing_is_one_clear_line(mirror, task, shots, message):
    with pytest.raises(EoraLabError, match=message) as caught:
        evaluate_tasks(tiny_model("llama"), tiny_tokenizer(), [task], 2, shots)
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_embedding_are_one_clear_line(mirror):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Question"])
    with pytest.raises(EoraLabError, match="token id 97 has no row in the model's embedding of 97"):
        evaluate_tasks(tiny_model("llama"), tokenizer, ["arc_easy"], 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit must be 1 or more, not 0"),
        ({"limit": -1}, "limit must be 1 or more, not -1"),
        ({"num_fewshot": -1}, "num_fewshot must be 0 or more, not -1"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
    ],
)
def test_numbers_out_of_range_are_one_clear_line(arguments, message):
    with pytest.raises(EoraLabError, match=message):
        evaluate_tasks(tiny_model("llama"), tiny_tokenizer(), ["arc_easy"], **arguments)


@pytest.mark.parametrize(
    ("task", "lacking", "message"),
    [
        ("arc_easy", ("bos_token", "eos_token"), "neither a start nor an end token"),
        ("gsm8k", ("eos_token",), "gsm8k writes up to 256 tokens, and the tokenizer has no end token"),
        ("gsm8k", (), "gsm8k writes up to 256 tokens, and the model takes 128 in all"),
    ],
)
def test_a_task_that_does_not_fit_is_one_clear_line(mirror, task, lacking, message):
    tokenizer = tiny_tokenizer()
    for name in lacking:
        setattr(tokenizer, name, None)
    with pytest.raises(EoraLabError, match=message):
        evaluate_tasks(tiny_model("llama"), tokenizer, [task], 2, 0)


@pytest.mark.parametrize("lacking", ["bos_token", "eos_token"])
def test_one_of_the_tokens_is_enough_for_multiple_choice(mirror, lacking):
    tokenizer = tiny_tokenizer()
    setattr(tokenizer, lacking, None)
    model = tiny_model("llama")
    assert evaluate_tasks(model, tokenizer, ["arc_easy"], 4) == evaluate_tasks(model, tiny_tokenizer(), ["arc_easy"], 4)


def test_questions_longer_than_the_context_are_told(mirror):
    model = tiny_model("llama")
    model.config.max_position_embeddings = 24  # "Question: Which is 0?\nAnswer: one" has 33
    with pytest.warns(UserWarning, match=r"arc_easy: 8 requests are longer than the 24 tokens"):
        evaluate_tasks(model, tiny_tokenizer(), ["arc_easy"], 2)
    model.config.max_position_embeddings = 3  # " one" has 4
    with pytest.raises(EoraLabError, match="an answer has 4 tokens, and the model takes at most 3"):
        evaluate_tasks(model, tiny_tokenizer(), ["arc_easy"], 2)


def test_lm_eval_missing_is_one_clear_line():
    code = """
import sys
sys.modules["lm_eval"] = None
from eora_lab.measure.tasks import evaluate_tasks
from eora_lab import EoraLabError
try:
    evaluate_tasks(None, None, ["arc_easy"])
except EoraLabError as error:
    sys.exit("eora-lab[eval]" not in str(error))
sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_exemplars_are_held_out_questions_with_their_stated_answer():
    splits = exemplar_questions()
    assert len(splits["heldout"]) > 80 and len(splits["calibration"]) > 150
    assert not set(splits["heldout"]["question"]) & set(splits["calibration"]["question"])
    found = {row["question"].split("\n")[0]: row["answer"] for split in splits.values() for row in split}
    assert found["Which of the following is the body cavity that contains the pituitary gland?"] == 1
    counts = np.bincount(splits["heldout"]["answer"], minlength=4)
    assert (counts > 5).all()


def test_rouge_lsum_matches_sentences_not_lines():
    doc = {"highlights": "The cat sat .\nThe dog ran ."}
    assert rouge_lsum(doc, ["The dog ran. The cat sat."])["rougeLsum"] == 1.0  # any order of sentences
    assert rouge_lsum(doc, ["Nothing else matters."])["rougeLsum"] == 0.0


def result(value: float, n: int = 100, chance: float | None = 0.25) -> TaskResult:
    outcomes = [1.0] * round(value * n) + [0.0] * round((1 - value) * n)
    stderr = float(np.std(outcomes, ddof=1) / n**0.5)
    return TaskResult("task", "acc", value, stderr, 0, chance, [str(i) for i in range(n)], outcomes)


def test_a_base_near_chance_is_flagged():
    assert "within noise of chance" in result(0.26).near_chance
    assert "within noise of chance" in result(0.10).near_chance
    assert not result(0.45).near_chance
    assert not result(0.0, chance=None).near_chance


def test_paired_bootstrap_is_narrower_than_two_standard_errors_and_covers():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 3, 400)
    a, b = difficulty + rng.normal(0, 0.3, 400), difficulty + 0.1 + rng.normal(0, 0.3, 400)
    interval = paired_bootstrap(a, b)
    exact = 1.96 * np.std(b - a, ddof=1) / 20  # the normal interval of the paired differences
    assert interval.difference == pytest.approx(np.mean(b) - np.mean(a))
    assert interval.high - interval.low == pytest.approx(2 * exact, rel=0.05)
    assert interval.decided and interval.high - interval.low < 0.2 * 2 * 1.96 * np.hypot(np.std(a), np.std(b)) / 20
    assert paired_bootstrap(a, b) == interval
    covered = 0
    for trial in range(200):
        gaps = np.random.default_rng(trial).exponential(1, 50)  # skewed, mean 1
        found = paired_bootstrap(np.zeros(50), gaps, resamples=1000)
        covered += found.low <= 1 <= found.high
    assert 170 <= covered <= 200  # 95 % nominal; percentile intervals of skewed data cover a little less


def test_intervals_refuse_what_is_not_paired():
    with pytest.raises(EoraLabError, match="same questions"):
        paired_bootstrap([1.0, 0.0], [1.0])
    with pytest.raises(EoraLabError, match="finite"):
        paired_bootstrap([1.0, float("nan")], [1.0, 1.0])


def test_a_margin_decides_what_as_many_answers_cannot():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 3, 200)
    after = before + 0.2 + rng.normal(0, 0.5, 200)  # a little surer of the right answer, and right hardly more often
    a, b = (
        replace(result(0.5, 200), outcomes=(margins > 0).astype(float).tolist(), margins=margins.tolist())
        for margins in (before, after)
    )
    found = compare_results(a, b)
    assert found["margin"].decided and not found["acc"].decided
    assert found["margin"].difference == pytest.approx(np.mean(after - before))
    assert set(compare_results(replace(a, margins=[]), b)) == {"acc"}  # of an older measurement


def test_window_losses_are_what_perplexity_averages():
    model = tiny_model("llama")
    windows = torch.randint(3, 97, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double().log_softmax(-1)
    exact = -logits.gather(-1, windows[:, 1:, None]).squeeze(-1).mean(1)
    torch.testing.assert_close(window_losses(model, windows), exact, rtol=1e-5, atol=0)
    assert perplexity(model, windows) == pytest.approx(exact.mean().exp().item(), rel=1e-5)


def test_the_command_prints_tasks_and_intervals(mirror, monkeypatch, capsys):
    monkeypatch.chdir(mirror)
    for name, seed in (("one", 0), ("two", 1)):
        tiny_model("llama", seed).save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    (mirror / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    text = ["--perplexity", "text.txt", "--windows", "4", "--window-length", "32"]
    assert main(["evaluate", "one", *text, "--tasks", "arc_easy", "--limit", "8", "--against", "two"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("arc_easy acc") == 3 and captured.out.count("margin") == 3
    assert (
        re.search(r"^arc_easy margin [+-]\d\.\d{4} \[.*\] nats$", captured.out, re.M)
        and "two minus one" in captured.out
    )
    assert "log perplexity" in captured.out and "within noise of chance" in captured.err
