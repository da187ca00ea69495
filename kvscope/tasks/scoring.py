"""Score what a model said against the right answers, 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from kvscope.core.errors import UsageError
from kvscope.core.registry import nearest

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact(said: str, answers: Sequence[str]) -> float:
    """Return 1 if the text begins with a right answer, otherwise 0; case and the amount of white space are ignored.

    What follows the answer must not be a letter or digit, which would continue its last word.
    """
    text = " ".join(said.lower().split())
    wanted = [" ".join(answer.lower().split()) for answer in answers]
    return float(any(text.startswith(one) and not text[len(one) : len(one) + 1].isalnum() for one in wanted))


def all_answers(said: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that are in the text: RULER's ``string_match_all``."""
    return sum(answer.lower() in said.lower() for answer in answers) / len(answers)


def any_answer(said: str, answers: Sequence[str]) -> float:
    """Return 1 if any of the answers is in the text, otherwise 0: RULER's ``string_match_part``."""
    return float(any(answer.lower() in said.lower() for answer in answers))


def f1(said: str, answers: Sequence[str]) -> float:
    """Return the best F1 of the words of the text and of an answer, as SQuAD and LongBench define it.

    Case, punctuation and the articles a, an, the are ignored.
    """
    return max(_f1(_normalised(said), _normalised(answer)) for answer in answers)


def rouge_l(said: str, answers: Sequence[str]) -> float:
    """Return the best ROUGE-L F-measure of the text and an answer; needs the package ``rouge-score``.

    Raises
    ------
    UsageError
        If the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UsageError("the score rouge-l needs another package", "Install it: pip install rouge-score") from None
    scorer = RougeScorer(["rougeL"])
    return max(float(scorer.score(answer, said)["rougeL"].fmeasure) for answer in answers)


def f1_line(said: str, answers: Sequence[str]) -> float:
    """Return `f1` of the first line: LongBench's score of triviaqa."""
    return f1(_first_line(said), answers)


def rouge_l_line(said: str, answers: Sequence[str]) -> float:
    """Return `rouge_l` of the first line, as LongBench scores samsum; errors as `rouge_l`."""
    return rouge_l(_first_line(said), answers)


def numbers(said: str, answers: Sequence[str]) -> float:
    """Return the share of the numbers in the text that are the number of an answer, the best of the answers.

    It is LongBench's score of passage_count and of passage_retrieval, whose answers are as ``5`` and ``Paragraph 5``. 0
    for a text without numbers.
    """
    found = re.findall(r"\d+", said)
    wanted = [number for answer in answers for number in re.findall(r"\d+", answer)[:1]]
    return max((found.count(number) / len(found) for number in wanted), default=0.0) if found else 0.0


def code(said: str, answers: Sequence[str]) -> float:
    """Return how similar the first line of code and an answer are, as LongBench scores lcc and repobench-p.

    Lines with a backquote, ``#`` or ``//`` are skipped. It is the ratio of `difflib`, rounded to hundredths, which
    fuzzywuzzy computes where no other package is installed.
    """
    lines = said.lstrip("\n").split("\n")
    line = next((each for each in lines if not any(mark in each for mark in ("`", "#", "//"))), "")
    return max(round(100 * SequenceMatcher(None, line, answer).ratio()) / 100 for answer in answers)


def classification(said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Return how well the first line names the class that an answer is, as LongBench scores trec and lsht.

    It is 1 divided by the number of classes in the line, if the right one is among them, else 0. A class whose name is
    part of the right one's name does not count. As in LongBench's code, which removes such names from the list that it
    walks through, the name after a removed one is not looked at. Of several answers the best counts.
    """
    return max(_classified(_first_line(said), answer, classes) for answer in answers)


def _classified(line: str, answer: str, classes: Sequence[str]) -> float:
    found, place = [name for name in classes if name in line], 0
    while place < len(found):
        if found[place] in answer and found[place] != answer:
            del found[place]
        place += 1
    return 1 / len(found) if answer in found else 0.0


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "all": all_answers,
    "any": any_answer,
    "f1": f1,
    "rouge-l": rouge_l,
    "f1-line": f1_line,
    "rouge-l-line": rouge_l_line,
    "numbers": numbers,
    "code": code,
    "classification": classification,
}


def score(metric: str, said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Return how right a text is by a metric of `SCORES`, 0 to 1.

    Parameters
    ----------
    metric : str
        A name in `SCORES`.
    said : str
        What the model said.
    answers : sequence of str
        Right answers.
    classes : sequence of str
        The classes among which an answer is to choose; only ``classification`` asks for them.

    Raises
    ------
    UsageError
        If there is no such metric, or no answer; for ``classification``, if there are no classes.
    """
    if metric not in SCORES:
        raise UsageError(f"no score is called {metric!r}", nearest(metric, SCORES))
    if not answers:
        raise UsageError("an example has no answers to score with", "Give it answers, or omit the scoring.")
    if metric != "classification":
        return SCORES[metric](said, answers)
    if not classes:
        raise UsageError(
            "an example has no classes to score with", 'Give it "classes": ["location", "number"], or another score.'
        )
    return classification(said, answers, classes)


def _first_line(said: str) -> str:
    return said.lstrip("\n").partition("\n")[0]


def _normalised(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return _ARTICLES.sub(" ", plain).split()


def _f1(said: Sequence[str], answer: Sequence[str]) -> float:
    if not said or not answer:
        return float(said == answer)
    common = sum((Counter(said) & Counter(answer)).values())
    return 2 * common / (len(said) + len(answer))
