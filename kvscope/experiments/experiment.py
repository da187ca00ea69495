"""What an experiment is: every key of its file, with its meaning and its default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from kvscope.core.budget import Budget
from kvscope.core.cache_scheme import parse_caches
from kvscope.core.errors import UsageError
from kvscope.core.experiment_records import Step
from kvscope.core.json_records import Number, Positive, about, plain
from kvscope.core.merge_scheme import parse_merges
from kvscope.core.options import ClosedLoopOptions, GenerateOptions, PlanOptions, Positions, Prefill, ReplayOptions

if TYPE_CHECKING:
    from kvscope.policies.base import Traits

Schemes = TypeVar("Schemes")
SIXTEEN_BIT = "16bit"
StepName = Literal["trace", "replay", "closed-loop", "generate", "report"]


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model of an experiment."""

    model: Annotated[str, about("`demo`, an alias, a Hub id or a folder")]
    revision: Annotated[str | None, about("branch, tag or commit of a Hub model", omit=True)] = None
    dtype: Annotated[str, about("`auto`, `float32`, `float64`, `float16` or `bfloat16`", omit=True)] = "auto"
    device_map: Annotated[str | None, about("how accelerate places its layers on devices", omit=True)] = None
    quantize: Annotated[str | None, about("`4bit` or `8bit`", omit=True)] = None
    trust_remote_code: Annotated[bool, about("whether the code of the model may run", omit=True)] = False

    @property
    def title(self) -> str:
        """What tables call it: its name, and how it is loaded where that is not the default."""
        own = [f"{name}={value}" for name, value in plain(self).items() if name != "model"]
        return f"{self.model} ({', '.join(own)})" if own else self.model


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The content of an experiment's file, with every default."""

    name: Annotated[str, about("its name: results are `reports/NAME.json` and `reports/NAME.html`")]
    models: Annotated[tuple[ModelEntry, ...], about("models; `model` names a single one")]
    policies: Annotated[
        tuple[str, ...],
        about("policies as after `--policy`, or `{a2sf: {alpha: [0.3, 0.7]}}` for all combinations of the values"),
    ] = ()
    budgets: Annotated[tuple[str, ...], about("cache sizes: numbers of keys, or shares such as `20%`")] = ("20%",)
    prefill: Annotated[tuple[Prefill, ...], about("`full`, `stream` or both")] = (Prefill.full,)
    tasks: Annotated[tuple[str, ...], about("task families as for `kvscope tasks make`; they need `lengths`")] = ()
    lengths: Annotated[tuple[Positive, ...], about("largest number of tokens in the prompts of a task")] = ()
    examples: Annotated[Positive, about("number of examples for each task, length and seed")] = 10
    haystack: Annotated[str | None, about("text file for the haystacks of tasks")] = None
    prompts: Annotated[tuple[str, ...], about("files of prompts, as `kvscope trace` reads them")] = ()
    field: Annotated[str | None, about("field of the prompt in JSON files")] = None
    template: Annotated[str | None, about("text of every prompt of a file, with `{name}` for its fields")] = None
    chat: Annotated[bool, about("whether prompts are wrapped in the chat template of the model")] = False
    system: Annotated[str | None, about("system message before each prompt; needs `chat`")] = None
    seeds: Annotated[tuple[Number, ...], about("seeds of tasks: each gives other examples")] = (0,)
    max_new_tokens: Annotated[Positive, about("largest number of tokens after each prompt")] = 32
    store: Annotated[str, about("what traces store: `maps`, `maps+vectors`, `qkv` or `topk:K`")] = "maps"
    hidden: Annotated[
        bool | None,
        about("whether traces store layer inputs, from which gates decide; by default only for models with a gate"),
    ] = None
    steps: Annotated[
        tuple[StepName, ...],
        about(
            "steps to compute, among `trace`, `replay`, `closed-loop`, `generate` and `report`; by default all, but "
            "without `generate` if prompts come from files, which need not have answers"
        ),
    ] = ("trace", "replay", "closed-loop", "generate", "report")
    score: Annotated[str | None, about("score of answers; by default that of each task or dataset")] = None
    metrics: Annotated[tuple[str, ...] | None, about("metrics; by default all that the traces allow")] = None
    positions: Annotated[Positions, about("positions of the keys in the closed loop")] = Positions.original
    compress: Annotated[str | None, about("when to evict, as `--compress`")] = None
    allocate: Annotated[str | None, about("how budgets are divided, as `--allocate`")] = None
    accumulate: Annotated[str | None, about("precision of sums, as `--accumulate`")] = None
    scope: Annotated[str | None, about("what selects the keys, as `--scope`")] = None
    cache: Annotated[
        tuple[str, ...],
        about(
            "how caches are quantised, as `--cache`: `[16bit, int4:kivi]`; each policy and budget runs with each",
            omit=True,
        ),
    ] = ()
    merge: Annotated[
        tuple[str, ...],
        about(
            "how evicted keys are merged into those that stay, as `--merge`: `[none, cam]`; each policy that evicts "
            "runs with each; needs the closed loop, and a cache in 16 bit",
            omit=True,
        ),
    ] = ()
    device: Annotated[str, about("`auto`, `cpu`, `cuda`, `cuda:1`, `mps`")] = "auto"
    ray: Annotated[
        str | None,
        about("Ray cluster to run on: `HOST:PORT`, `auto` for the cluster of this machine, `local` to start one"),
    ] = None

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("the experiment names no model", "Write model: demo")
        if not self.tasks and not self.prompts:
            raise UsageError(
                "the experiment has neither tasks nor prompts", "Write tasks: [needle], and lengths: [512]"
            )
        if self.tasks and not self.lengths:
            raise UsageError("the tasks have no lengths", "Write lengths: [512, 1024]")
        if self.replays and not self.policies:
            raise UsageError("the experiment names no policy", "Write policies: [h2o, tova]")
        for budget in self.budgets:
            Budget.parse(budget)
        self._require_schemes()

    def _require_schemes(self) -> None:
        """Raise UsageError for an unknown cache or merging rule, one that is given twice, or both at once."""
        caches = _parsed("cache", lambda: parse_caches(self.cache))
        merges = _parsed("merge", lambda: parse_merges(self.merge))
        quantised, merging = (next(filter(None, found), None) for found in (caches, merges))
        if quantised and merging:
            raise UsageError(
                f"merge: {merging} cannot be combined with a cache in {quantised}: the rule leaves open how codes are "
                "merged",
                "Write two experiments, one with cache and one with merge.",
            )
        if merging and "closed-loop" not in self.loop_steps:
            raise UsageError(
                f"merge: {merging} runs in the closed loop alone, which is not among the steps",
                "Add closed-loop to steps.",
            )

    @property
    def replays(self) -> bool:
        """Whether anything is done beyond traces."""
        return set(self.steps) != {"trace"}

    @property
    def loop_steps(self) -> tuple[Step, ...]:
        """What is done for every run: generating needs the closed loop, and that needs the open one."""
        if "generate" in self.steps:
            return ("replay", "closed-loop", "generate")
        return ("replay", "closed-loop") if "closed-loop" in self.steps else ("replay",)

    @property
    def plan(self) -> PlanOptions:
        """Choices for every policy; caches and merging rules are those of each run."""
        return PlanOptions(compress=self.compress, allocate=self.allocate, accumulate=self.accumulate, scope=self.scope)

    def variants(self, traits: Traits) -> list[tuple[str | None, str | None]]:
        """Return the caches and merging rules that a policy runs with; None is what it runs with by default.

        A policy that holds every key has nothing to merge, and a bound is of a cache that is not changed.
        """
        caches = [None if traits.clairvoyant else str(each or SIXTEEN_BIT) for each in parse_caches(self.cache)]
        merges = [None if each is None else str(each) for each in parse_merges(self.merge)]
        if traits.clairvoyant or traits.reads or traits.phase == "none":
            merges = []
        return list(dict.fromkeys((cache, merge) for cache in caches or [None] for merge in merges or [None]))

    def replay_options(self, model: ModelEntry, prefill: Prefill, device: str) -> ReplayOptions:
        """Return the options of a replay of a model's traces."""
        closed = ClosedLoopOptions(self.positions, None, model.dtype, model.device_map)
        return ReplayOptions(
            prefill=prefill,
            plan=self.plan,
            metrics=self.metrics,
            closed=closed if "closed-loop" in self.loop_steps else None,
            generate=GenerateOptions(None, self.score) if "generate" in self.loop_steps else None,
            device=device,
        )


def _parsed(key: str, parse: Callable[[], Schemes]) -> Schemes:
    """Return what is parsed; an error names the key of the file in place of the option."""
    try:
        return parse()
    except UsageError as error:
        raise UsageError(f"{key}: {error.what.removeprefix(f'--{key} ')}", error.todo) from error
