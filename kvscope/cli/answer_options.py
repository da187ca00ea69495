"""The options of `replay` that let the model answer under each policy."""

from __future__ import annotations

from typing import Annotated

import typer

Generate = Annotated[
    bool,
    typer.Option(
        "--generate", help="Let the model answer under each policy, and score the answers; adds the closed loop."
    ),
]
AnswerTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        help="With --generate: at most N tokens for each answer. Default: as many as in the trace.",
        min=1,
    ),
]
AnswerScore = Annotated[
    str | None,
    typer.Option(
        "--score",
        metavar="NAME",
        help="With --generate: score by exact, all, any, f1 or rouge-l. Default: as the dataset says.",
    ),
]
