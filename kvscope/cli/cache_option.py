"""The options that quantise the caches of a command's runs, and that merge evicted keys."""

from __future__ import annotations

from typing import Annotated

import typer

Cache = Annotated[
    list[str] | None,
    typer.Option(
        "--cache",
        metavar="SCHEME,...",
        help="Quantise the cache, with every policy: int4:kivi, int2:kivi(group=32,residual=64), int4:kvquant, "
        "int4:quanto, fp8; 16bit is not quantised.",
    ),
]
Merge = Annotated[
    list[str] | None,
    typer.Option(
        "--merge",
        metavar="RULE,...",
        help="Merge evicted keys into retained ones, with every policy: cam, d2o, kvmerger; none does not merge.",
    ),
]
