"""What papers claim about policies, and the result for each claim, as typed records.

A `Claim` comes with the package, in the file of its paper. `Reproduction` is the content of
``reports/reproduce-NAME.json``; this module is its only reader and writer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from kvscope.core.errors import ResultError
from kvscope.core.json_records import Finite, Format, NotNegative, Number, Positive, about

SCHEMA_VERSION = 1
HISTORY = {1: "first version"}
REPRODUCTION = Format(
    "kvscope-reproduction",
    "reproduction of a paper",
    SCHEMA_VERSION,
    ResultError,
    "Remove it, and reproduce the paper again.",
)
Agreement = Literal["agrees", "differs", "not certain", "missing"]
Keys = Literal["read_keys", "held_keys"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A policy under a budget."""

    policy: Annotated[str, about("policy with its parameters")]
    budget: Annotated[str | None, about("budget; null for a policy without one")] = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One setting is better than another, by a metric."""

    says: Annotated[str, about("the claim")]
    where: Annotated[str, about("table, figure or section of the paper, or another source")]
    part: Annotated[str, about("the experiment that tests it")]
    metric: Annotated[str, about("metric of the test")]
    better: Annotated[Setting, about("the setting that the paper calls better")]
    worse: Annotated[Setting, about("the other one; with `equal` its budget is null")]
    equal: Annotated[
        Keys | None,
        about("keys whose number is equal in both: the worse setting is interpolated over its budgets", omit=True),
    ] = None
    paper: Annotated[
        tuple[Finite, ...],
        about("the paper's values for the better and the worse setting; empty if not available to us"),
    ] = ()
    instead_of: Annotated[
        str | None, about("what the paper measures; null if it measures the metric or an equivalent", omit=True)
    ] = None
    bundled: Annotated[
        str | None, about("why the bundled model gives another result, as far as we measured it", omit=True)
    ] = None

    def __post_init__(self) -> None:
        if len(self.paper) not in (0, 2):
            raise ValueError("`paper` has two values: of the better and of the worse one")
        if self.equal is not None and self.worse.budget is not None:
            raise ValueError("with `equal`, the worse one has no budget: it is interpolated over all of them")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result for a claim."""

    claim: Annotated[Claim, about("the claim, with policies and budgets as in the summary of the experiment")]
    agreement: Annotated[Agreement, about("whether the order is that of the paper")]
    why: Annotated[str, about("why a value is missing, or what was omitted; otherwise empty")] = ""
    better: Annotated[Finite | None, about("mean over sequences of the setting that the paper calls better")] = None
    worse: Annotated[Finite | None, about("mean of the other setting on the same sequences")] = None
    difference: Annotated[Finite | None, about("mean of the better setting minus mean of the worse one")] = None
    low: Annotated[Finite | None, about("lower end of the 95 % interval of the difference over clusters")] = None
    high: Annotated[Finite | None, about("upper end")] = None
    p: Annotated[NotNegative | None, about("p-value of the sign test over clusters that the two are equal")] = None
    sequences: Annotated[Number, about("number of sequences for which both have a value")] = 0
    clusters: Annotated[Number, about("their number, with near-copies counted as one")] = 0


@dataclass(frozen=True, kw_only=True)
class SettingValue:
    """The value of one setting by a metric of the claims, over all sequences of its experiment."""

    part: Annotated[str, about("the experiment")]
    metric: Annotated[str, about("the metric")]
    setting: Annotated[Setting, about("the setting")]
    mean: Annotated[Finite, about("mean over sequences")]
    low: Annotated[Finite | None, about("lower end of its 95 % interval over clusters")]
    high: Annotated[Finite | None, about("upper end")]
    sequences: Annotated[Positive, about("number of sequences with a value")]


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """The content of ``reports/reproduce-NAME.json``."""

    name: Annotated[str, about("name of the paper in kvscope")]
    title: Annotated[str, about("its title")]
    source: Annotated[str, about("its source")]
    model: Annotated[str, about("model that ran")]
    paper_model: Annotated[str, about("model of the paper to which the paper's values belong")]
    notes: Annotated[tuple[str, ...], about("how this differs from the paper")]
    versions: Annotated[Mapping[str, str], about("version of kvscope")]
    summaries: Annotated[Mapping[str, str], about("for each experiment, the name of its summary in `reports`")]
    findings: Annotated[tuple[Finding, ...], about("the result for each claim")]
    values: Annotated[tuple[SettingValue, ...], about("the values of every setting, by the metrics of the claims")]

    def count(self, agreement: Agreement) -> int:
        """Return how many claims had such a result."""
        return sum(finding.agreement == agreement for finding in self.findings)
