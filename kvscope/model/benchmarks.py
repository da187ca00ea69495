"""How the files that RULER and LongBench publish are scored: both leave it to their code, not to the files."""

from __future__ import annotations

from pathlib import Path

from kvscope.core.json import JsonDict

RULER_FIELDS = {"index", "input", "outputs"}
# RULER's scripts/eval/synthetic/constants.py: prefix of a task -> score.
RULER_SCORES = {"niah": "all", "vt": "all", "cwe": "all", "fwe": "all", "qa": "any"}
LONGBENCH_FIELDS = {"input", "context", "answers", "dataset", "all_classes"}
# LongBench's eval.py: dataset -> score. Of those that are scored by their first line only, eval.py takes that alone.
LONGBENCH_SCORES = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), "f1"),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), "rouge-l"),
    **dict.fromkeys(("trec", "lsht"), "classification"),
    **dict.fromkeys(("dureader", "vcsum"), "rouge-l-zh"),
    **dict.fromkeys(("lcc", "repobench-p"), "code"),
    "multifieldqa_zh": "f1-zh",
    "triviaqa": "f1-line",
    "samsum": "rouge-l-line",
    "passage_count": "numbers",
    "passage_retrieval_en": "numbers",
    "passage_retrieval_zh": "numbers",
}
_PARTS = ("validation", "test", "train", "dev")  # file names of RULER, whose folder names the task


def with_benchmark(file: str, entry: JsonDict) -> JsonDict:
    """Return an object with the task and the score that its benchmark gives it, where it names none itself.

    RULER writes the task into the path alone, as ``niah_single_1/validation.jsonl``; LongBench into ``dataset``.
    """
    if "metric" in entry:
        return entry
    if entry.keys() >= LONGBENCH_FIELDS:
        name = str(entry["dataset"]).removesuffix("_e")
        return {**entry, "metric": LONGBENCH_SCORES[name]} if name in LONGBENCH_SCORES else entry
    if entry.keys() >= RULER_FIELDS and "task" not in entry:
        path = Path(file)
        stem = path.name.partition(".")[0]
        task = path.parent.name if stem in _PARTS else stem
        for prefix, score in RULER_SCORES.items():
            if task == prefix or task.startswith(f"{prefix}_"):
                return {**entry, "task": task, "metric": score}
    return entry
