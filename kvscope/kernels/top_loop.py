"""The compiled loop of `top`, which imports this module when it is called."""

from __future__ import annotations

from kvscope.kernels.arrays import Array
from kvscope.kernels.compiled import compiled


@compiled
def mark_rows(first: int, last: int, rows: Array, least: Array, budgets: Array, marks: Array) -> None:
    """Fill `marks` for rows `first` to `last` - 1 and every budget."""
    n = rows.shape[1]
    for number in range(len(budgets)):
        for place in range(first, last):
            row, mark, edge = rows[place], marks[number, place], least[number, place]
            above = ties = 0
            for j in range(n):
                mark[j] = row[j] >= edge and row[j] >= 0
                above += row[j] > edge and row[j] >= 0
                ties += row[j] == edge and row[j] >= 0
            extra = above + ties - budgets[number]
            for j in range(n):
                if extra <= 0:
                    break
                if row[j] == edge and row[j] >= 0:  # of equal weights the oldest is excluded
                    mark[j] = False
                    extra -= 1
