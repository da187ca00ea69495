"""Count the operations that torch does for a token under each policy, on the code that a GPU runs, without a GPU.

python tools/operations.py [POLICY ...]

It writes benchmarks/results/operations.json, from which the README's table is made; given policies, it counts these
again and keeps the others.

A GPU computes faster than the host starts its work: a step costs the operations that are started, each some
microseconds, and every wait of the host for a number on the device. Both are counted on a CPU, with Triton's kernel in
its interpreter and the kernels for CPUs off. A count is the difference between two texts of random tokens, one longer
than the other, and so without what every text costs once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from kvscope.closed_loop import forward
from kvscope.closed_loop.compile import evaluate
from kvscope.closed_loop.decode import decode
from kvscope.closed_loop.feasible import require_decodable
from kvscope.closed_loop.passage import Passage
from kvscope.core.budget import Budget
from kvscope.core.errors import UsageError
from kvscope.core.options import Loop, ModelSource, Positions, Prefill
from kvscope.core.version import versions
from kvscope.engine import quantised_steps, simulation
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Block, Shape
from kvscope.engine.runs import RunSpec
from kvscope.engine.torch_stepper import TorchStepper
from kvscope.kernels import device as devices
from kvscope.metrics import METRICS
from kvscope.model.loading import load
from kvscope.policies import POLICIES
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policy
from kvscope.trace.reader import TokenSequence

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "operations.json"
LAYERS, BUDGET, PROMPT = 2, 20, 28  # the prompt exceeds the budget
FEW, MORE = 8, 16  # tokens after the prompt, and how many more the longer text has
GATED = "attention-gate"  # has a gate for the bundled model only
OF_DEMO = (GATED, "dms", "q-filters", "kvzap")  # have files for the bundled model only

# Operations after which the host waits: it reads a number, has to know how many entries there are, or copies numbers
# of its own into a tensor.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "lift_fresh", "_unique2", "unique_dim"}
READS = frozenset("item tolist numpy cpu __bool__ __int__ __float__ __index__ __array__ __contains__".split())
NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "detach_", "lift_fresh", "_unsafe_view"}


class _Reads(TorchFunctionMode):
    """Counts calls that hand the numbers of a tensor to the host: on a CPU most of them are no operation."""

    def __init__(self, counts: Counter[str], waits: Counter[str]) -> None:
        super().__init__()
        self._counts, self._waits = counts, waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._waits.total()
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in READS and self._waits.total() == before:
            self._counts[f"Tensor.{name}"] += 1
            self._waits[f"Tensor.{name}"] += 1
        return result


class Operations(TorchDispatchMode):
    """Counts the operations of torch while it is entered.

    Attributes
    ----------
    counts : Counter
        By name, operations that start work on a device: views and new memory apart; composed ones in their parts.
    waits : Counter
        By name, those for which the host waits. On a CPU they are known by what they do, not by their duration.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._reads = _Reads(self.counts, self.waits)

    def __enter__(self) -> Operations:
        super().__enter__()
        self._reads.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reads.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self, torch._C.DisableTorchFunction():  # a composed operation is counted as its parts
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = func.overloadpacket.__name__
        if _waits(name, args):
            self.waits[name] += 1
        if not func.is_view and name not in NO_WORK:
            self.counts[name] += 1
        return func(*args, **kwargs)

    @property
    def launched(self) -> int:
        """Operations of all kinds."""
        return self.counts.total()


def _waits(name: str, args: Any) -> bool:
    if name in ("index", "index_put", "index_put_"):  # a mask as an index is searched for its true entries
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in WAITS or (name == "repeat_interleave" and len(args) == 1)


@contextmanager
def as_on_a_gpu() -> Iterator[dict[str, str]]:
    """Step, score and attend on the CPU by the code of a GPU; yields which stepper each policy was given."""
    from kvscope.engine.triton_stepper import TritonStepper

    chosen, steppers = simulation.choose_stepper, dict[str, str]()

    def choose(fallback: Any, inputs: Any, state: Any, sharing: Any) -> Any:
        found = chosen(fallback, inputs, state, sharing)
        rule = simulation.kernel_rule(inputs, sharing) if isinstance(found, TorchStepper) else None
        found = found if rule is None else TritonStepper(inputs, state, rule)
        steppers[inputs.plan.policy.name] = type(found).__name__
        return found

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(simulation, "choose_stepper", choose))
        patches.enter_context(mock.patch.object(quantised_steps, "available", return_value=False))
        patches.enter_context(mock.patch.object(forward, "BLOCK_QUERIES", forward.GPU_BLOCK_QUERIES))
        patches.enter_context(mock.patch.object(devices, "on_cpu", return_value=False))
        patches.enter_context(mock.patch.dict(os.environ, {"KVSCOPE_NO_KERNELS": "1"}))
        yield steppers


class Nothing:
    """A sink that discards everything."""

    def residency(self, *_: Any, **__: Any) -> None:
        """Discard residency intervals."""

    def fidelity(self, *_: Any, **__: Any) -> None:
        """Discard metrics."""

    def tokens(self, *_: Any, **__: Any) -> None:
        """Discard losses."""


def small_model(layers: int = LAYERS, kv_heads: int = 2) -> Any:
    """Return a model of random weights, with two query heads for each key/value head."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 2 * kv_heads, "num_key_value_heads": kv_heads, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=None, eos_token_id=None)).eval()


def model_of(spec: str) -> Any:
    """Return the small model, or the bundled one for a policy with a gate."""
    return load(ModelSource("demo", device="cpu")).model if spec.startswith(OF_DEMO) else small_model()


def ids_of(length: int) -> torch.Tensor:
    """Return random tokens ``[T]``; a longer text begins as a shorter one."""
    return torch.randint(1, 64, (1024,), generator=torch.Generator().manual_seed(1))[:length]


def kinds_of(length: int) -> torch.Tensor:
    """Return the classes of these tokens, ``[T]``: every eighth is special, every fourth punctuation."""
    return torch.where(ids_of(length) % 8 == 0, 2.0, (ids_of(length) % 4 == 0).float())


def counted(work: Callable[[], object]) -> Operations:
    """Return the operations of some work on the code of a GPU."""
    with as_on_a_gpu(), torch.inference_mode(), Operations() as operations:
        work()
    return operations


def closed(
    model: Any,
    spec: str,
    prompt: int,
    length: int,
    *,
    runs: int = 1,
    prefill: Prefill = Prefill.full,
    metrics: Sequence[str] = (),
    positions: Positions = Positions.original,
) -> Operations:
    """Count the operations of a closed loop over random tokens, under one budget or several in one pass."""
    plan = EvictionPlan.published(parse_policy(spec))
    every = [RunSpec(run, plan, Budget.parse(str(BUDGET + run)), Loop.closed, positions) for run in range(runs)]
    text = Passage(TokenSequence(0, prompt, length), ids_of(length), kinds=kinds_of(length))
    measured = [METRICS.get(name) for name in metrics]
    return counted(lambda: evaluate(model, [text], every, measured, prefill, Nothing()))


def decoding(model: Any, spec: str, prompt: int, length: int) -> Operations:
    """Count the operations of decoding with evictions, as `kvscope verify` does."""
    plan = EvictionPlan.published(parse_policy(spec))
    return counted(lambda: decode(model, ids_of(length), plan, BUDGET, prompt=prompt, kinds=kinds_of(length)))


def generating(model: Any, prompt: int, length: int) -> Operations:
    """Count the operations of transformers' own generation with the full cache."""
    new = length - prompt
    given = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return counted(lambda: model.generate(ids_of(prompt)[None], **given))


def stepping(spec: str, length: int) -> Operations:
    """Count the operations of stepping one layer over given rows, for policies that have no closed loop."""
    policy, shape = parse_policy(spec), Shape(layers=(0,), heads=4, kv_heads=2, prompt=PROMPT, length=length)
    rows = torch.full((1, 4, length, length), 1 / length).tril()
    signals = {
        name: torch.zeros(1, 1, 2, length) for name in ("schedule", "reconstruction") if name in policy.traits.needs
    }
    simulation_ = simulation.CacheSimulation(policy, [BUDGET], shape, Prefill.full, signals)
    return counted(lambda: simulation_.block(Block(rows, 0)))


@dataclass(frozen=True)
class Cost:
    """What one more token costs: operations, and waits of the host."""

    operations: float
    waits: float

    @classmethod
    def between(cls, short: Operations, long: Operations, tokens: int) -> Cost:
        """Return the cost of each of `tokens` tokens that one text has more than the other."""
        launched, waited = long.launched - short.launched, long.waits.total() - short.waits.total()
        return cls(launched / tokens, waited / tokens)


def cost(spec: str) -> dict[str, Any]:
    """Return what one more token costs under a policy, see `figures`."""
    policy = parse_policy(spec)
    if policy.traits.clairvoyant or policy.traits.needs & {"selection", "reconstruction"}:
        short, long = (stepping(spec, PROMPT + FEW + more) for more in (0, MORE))
        return {"stepper": "TorchStepper", "open_token": asdict(Cost.between(short, long, MORE))}
    model, more = model_of(spec), _period(policy)
    layers, stepper = model.config.num_hidden_layers, stepper_of(model, spec)  # also loads what is loaded once
    short, long = (closed(model, spec, PROMPT, PROMPT + FEW + add) for add in (0, more))
    later = closed(model, spec, PROMPT + MORE, PROMPT + MORE + FEW)
    found = {
        "stepper": stepper,
        "token": asdict(Cost.between(short, long, more * layers)),
        "prompt_token": asdict(Cost.between(short, later, MORE * layers)),
    }
    if not spec.startswith(OF_DEMO):
        wide = small_model(kv_heads=4)
        several = [closed(wide, spec, PROMPT, PROMPT + FEW + add, runs=4) for add in (0, more)]
        found["token_of_4_runs_and_twice_the_heads"] = asdict(Cost.between(*several, more * layers))
    return found | {"decoding": _decoding(spec, more)}


def stepper_of(model: Any, spec: str) -> str:
    """Return the name of the stepper that a policy gets on a GPU."""
    policy = parse_policy(spec)
    with as_on_a_gpu() as steppers:
        closed_loop = Passage(TokenSequence(0, PROMPT, PROMPT + 1), ids_of(PROMPT + 1), kinds=kinds_of(PROMPT + 1))
        runs = [RunSpec(0, EvictionPlan.published(policy), Budget.parse(str(BUDGET)), Loop.closed)]
        evaluate(model, [closed_loop], runs, [], Prefill.full, Nothing())
    return steppers[policy.name]


def figures(again: Sequence[str] = ()) -> dict[str, Any]:
    """Return the cost of one more token in each layer, under every policy of the package and in plain generation.

    Given policies, those of the others are as recorded.
    """
    names = [name for name in POLICIES.names() if POLICIES.get(name).__module__.startswith("kvscope.policies.")]
    known = json.loads(OUTPUT.read_text(encoding="utf-8"))["policies"] if again else {}
    return {
        "how": "Operations that torch starts, and waits of the host, for one more token: in each layer, and in all.",
        "versions": versions("torch", "transformers"),
        "generate": _by_layers(partial(generating, prompt=PROMPT), MORE),
        "policies": {
            name: known[name] if again and name in known and name not in again else cost(name) for name in sorted(names)
        },
    }


def _decoding(spec: str, more: int) -> dict[str, Any] | None:
    """Return the cost of a decoded token, or None where a policy cannot be decoded."""
    try:
        require_decodable(EvictionPlan.published(parse_policy(spec)))
    except UsageError:
        return None
    if not spec.startswith(OF_DEMO):
        return _by_layers(partial(decoding, spec=spec, prompt=PROMPT), more)
    model = model_of(spec)
    layers = model.config.num_hidden_layers
    short, long = (decoding(model, spec, PROMPT, PROMPT + FEW + add) for add in (0, more))
    return {f"of_{layers}_layers": asdict(Cost.between(short, long, more))}


def _by_layers(count: Callable[..., Operations], more: int) -> dict[str, Any]:
    """Return the cost of a token in each layer, and once for all layers, from models of different depth."""
    few, many = (
        Cost.between(*(count(small_model(layers), length=PROMPT + FEW + add) for add in (0, more)), more)
        for layers in (LAYERS, 2 * LAYERS)
    )
    layer = Cost((many.operations - few.operations) / LAYERS, (many.waits - few.waits) / LAYERS)
    once = Cost(few.operations - LAYERS * layer.operations, few.waits - LAYERS * layer.waits)
    return {"each_layer": asdict(layer), "all_layers": asdict(once)}


def _period(policy: Policy) -> int:
    """Return after how many tokens the same steps recur."""
    every = policy.phase.removeprefix("every:")
    return int(every) if every.isdigit() else MORE


def main() -> int:
    """Count, write the figures, and return the exit status."""
    if "TRITON_INTERPRET" not in os.environ:  # triton reads it when it is imported
        command = [sys.executable, __file__, *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode
    OUTPUT.write_text(json.dumps(figures(sys.argv[1:]), indent=1) + "\n", encoding="utf-8")
    print(OUTPUT.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
