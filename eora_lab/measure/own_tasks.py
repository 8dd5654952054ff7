"""Two tasks that lm-eval does not have, as lm-eval task configurations.

exemplars:      the held-out worked MMLU questions inside the lm-eval package, as multiple choice; needs no data.
cnn_dailymail:  summaries scored by ROUGE-Lsum (the paper's table T14); lm-eval's own task stops at ROUGE-L.
"""

import re

from eora_lab.text.sources import mmlu_exemplars

ANSWER = re.compile(r"answer is \(?([A-D])\)?", re.IGNORECASE)
LETTERS = "ABCD"


def exemplar_questions(**_) -> dict:
    """Split name -> dataset of question and answer (0..3). The few samples without a stated answer are left out."""
    import datasets

    splits = {}
    for split in ("calibration", "heldout"):
        found = [
            (sample["question"].strip(), ANSWER.findall(sample["target"])) for sample in mmlu_exemplars.samples(split)
        ]
        rows = [{"question": question, "answer": LETTERS.index(said[-1])} for question, said in found if said]
        splits[split] = datasets.Dataset.from_list(rows)
    return splits


def rouge_lsum(doc: dict, results: list[str]) -> dict[str, float]:
    """F-measure of ROUGE-Lsum (Lin 2004) with stemming, a sentence a line."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)
    written, reference = (_one_sentence_a_line(text) for text in (results[0], doc["highlights"]))
    return {"rougeLsum": scorer.score(reference, written)["rougeLsum"].fmeasure}


def _one_sentence_a_line(text: str) -> str:
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


OWN_TASKS = {
    "exemplars": {
        "task": "exemplars",
        "custom_dataset": exemplar_questions,
        "output_type": "multiple_choice",
        "training_split": "calibration",
        "test_split": "heldout",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": [f"({letter})" for letter in LETTERS],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "cnn_dailymail": {
        "task": "cnn_dailymail",
        "dataset_path": "abisee/cnn_dailymail",
        "dataset_name": "3.0.0",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "Article: {{article}}\n\nSummary:",
        "doc_to_target": "{{highlights}}",
        "process_results": rouge_lsum,
        "metric_list": [{"metric": "rougeLsum", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 128, "do_sample": False},
        "num_fewshot": 0,
    },
}
