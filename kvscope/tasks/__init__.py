"""Task families with exact answers: examples are generated from a seed, at any length.

The families follow those of RULER (Hsieh et al. 2024, arXiv:2404.06654) in what is planted, asked and right; the
docstring of each says where it differs. All wording is kvscope's own, so scores are not comparable with published ones.
`haystack.txt` is text of five novels in the public domain that the bundled model was not trained on.
"""

from __future__ import annotations

from kvscope.core.text_spans import TextSpan
from kvscope.tasks.base import TASKS, Example
from kvscope.tasks.make import make_examples
from kvscope.tasks.scoring import SCORES, score
from kvscope.tasks.spec import parse_task

__all__ = ["SCORES", "TASKS", "Example", "TextSpan", "make_examples", "parse_task", "score"]
