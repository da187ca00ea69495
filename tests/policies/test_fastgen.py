"""fastgen against its plain loop, and with the classes of real tokens in both loops and in decoding."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvscope.closed_loop.compile import compile_perplexity, compile_trace_loop, compile_verify
from kvscope.closed_loop.decode import attention_facts, decode
from kvscope.closed_loop.generation import GenerateJob
from kvscope.core.budget import parse_budgets
from kvscope.core.errors import TraceError, UsageError
from kvscope.core.options import (
    ClosedLoopOptions,
    Loop,
    ModelSource,
    OutputOptions,
    PerplexityOptions,
    Prefill,
    ReplayOptions,
)
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import runs_of
from kvscope.engine.signals import load_signal
from kvscope.model.generate import trace
from kvscope.model.loading import load
from kvscope.model.token_kinds import kinds_of_ids, kinds_of_text, special_ids
from kvscope.policies.fastgen import RULES
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay
from kvscope.replay.example import held
from kvscope.trace.importer import import_maps
from kvscope.trace.reader import Trace
from kvscope.trace.token_kinds import token_kinds as kinds_of_trace
from tests.engine.maps import attention, run, token_kinds
from tests.policies.decisions import HEADS, LENGTH, head_sets
from tests.reference.policies.fastgen import fastgen

TEXT = "In the beginning, there was a cache. It held keys; it held values: too many, perhaps! Who asked? 12 heads did."
SHARES = [(0.95, 0.3, 0.3), (0.6, 0.3, 0.3), (0.3, 0.2, 0.1), (0.75, 0.0, 0.5), (0.5, 0.5, 0.0), (0.99, 0.1, 0.1)]

RECOVER = [0.5, 0.8, 0.95]


def test_decisions_equal_the_plain_loop() -> None:
    rules: Counter[str] = Counter()
    for recover, frequent, local in SHARES:
        plan = EvictionPlan.published(parse_policy(f"fastgen:recover={recover},frequent={frequent},local={local}"))
        for seed, ((heads, groups), prompt) in enumerate(itertools.product(HEADS, [1, 9, 14, LENGTH - 1])):
            rows, kinds = attention(seed, 2, heads, LENGTH), token_kinds(seed, LENGTH)
            given = {"token_kinds": kinds.expand(2, groups, -1)}
            simulation = run(plan, rows, [LENGTH], kv_heads=groups, prompt=prompt, prefill="full", given=given)
            of_groups = rows.reshape(2, groups, -1, LENGTH, LENGTH).numpy()
            for layer, head in itertools.product(range(2), range(groups)):
                shares = recover, frequent, local
                visible, kept, rule = fastgen(of_groups[layer, head], prompt, kinds.int().tolist(), *shares)
                assert head_sets(simulation, layer, head) == (visible, kept)
                rules[RULES[rule]] += 1
    assert set(rules) == set(RULES), f"every rule is some head's: {rules}"


def test_of_equal_keys_the_newest_is_the_most_attended() -> None:
    rows = [[1], [0.5, 0.5], [0.5, 0, 0.5], [0.5, 0, 0, 0.5]]  # .5 for each of keys 1 to 3
    found = held("fastgen:recover=0.7,frequent=0.25,local=0", rows, 4, prompt=4, token_kinds=[2, 0, 0, 0])
    assert found[-1] == [0, 3]


def test_a_rule_that_just_recovers_is_chosen() -> None:
    rows, kinds = [[1], [0.5, 0.5], [0.5, 0.25, 0.25], [1, 0, 0, 0]], [2, 1, 0, 0]  # .75 special, .9375 named
    found = {
        share: held(f"fastgen:recover={share}", rows, 4, prompt=4, token_kinds=kinds)[-1] for share in (0.75, 0.76)
    }
    assert found == {0.75: [0], 0.76: [0, 1]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A trace of the bundled model, of which every head chooses by its rows."""
    folder = tmp_path_factory.mktemp("fastgen")
    (folder / "prompt.txt").write_text(TEXT)
    return trace("demo", [folder / "prompt.txt"], output=folder / "trace", max_new_tokens=12)


def test_a_trace_says_which_tokens_are_special_and_which_punctuation(demo: Trace) -> None:
    tokens, loaded = demo.tokens(0), load(ModelSource("demo", device="cpu"))
    kinds = kinds_of_trace(demo, 0)
    assert demo.header.special_tokens == special_ids(loaded.tokenizer)
    texts = tokens["text"].tolist()
    assert all(texts[place].strip(" ,.;:!?\n") == "" for place in np.flatnonzero(kinds == 1))
    assert {",", ".", ";", ":", "!", "?"} <= {texts[place].strip() for place in np.flatnonzero(kinds == 1)}
    assert ((kinds == 2) == tokens["token_id"].isin(demo.header.special_tokens)).all()
    assert (kinds == 0).sum() > 10
    assert torch.equal(torch.from_numpy(kinds), kinds_of_text(loaded.tokenizer, tokens["token_id"].tolist()))
    by_id = kinds_of_ids(loaded.tokenizer, loaded.text_config.vocab_size)
    assert torch.equal(by_id[torch.tensor(tokens["token_id"])], torch.from_numpy(kinds)), "text without parts"
    assert load_signal(demo, "token_kinds", 0, demo.layers).shape == (len(demo.layers), demo.kv_heads, len(kinds))


def plan(spec: str) -> EvictionPlan:
    return EvictionPlan.published(parse_policy(spec))


@pytest.mark.parametrize("recover", RECOVER)
def test_open_loop_closed_loop_and_decoding_evict_the_same_keys(demo: Trace, recover: float, tmp_path: Path) -> None:
    spec, prompt = f"fastgen:recover={recover}", demo.sequences[0].prompt
    loops = ReplayOptions(metrics=("retained_mass",), closed=ClosedLoopOptions(dtype="float64"))
    replay = compile_replay(demo, [spec], "50%", loops).execute(OutputOptions(tmp_path / "replay"))
    shape = (len(demo.layers), demo.kv_heads, -1)
    opened, closed = (
        replay.residency(run.run)
        .sort_values(["layer", "kv_head", "key"])["leave"]
        .fillna(-1)
        .to_numpy(int)
        .reshape(shape)
        for run in replay.info.runs
    )
    at_its_end = opened[..., :prompt] == prompt - 1
    assert 0 < at_its_end.sum() < at_its_end.size
    assert np.array_equal(at_its_end, closed[..., :prompt] == prompt - 1)
    (found,) = compile_verify(demo, [spec], "50%").execute()
    assert found.decided and found.agrees and found.different == 0, found


def test_generated_tokens_have_classes_too(demo: Trace) -> None:
    """What is generated with a shortened cache is what decoding the same tokens predicts."""
    run, sequence = runs_of([plan("fastgen:recover=0.5")], parse_budgets("50%"), Loop.closed)[0], demo.sequences[0]
    options = ReplayOptions(closed=ClosedLoopOptions(dtype="float64"))
    loaded = load(ModelSource("demo", dtype="float64", device="cpu"))
    closed, _ = compile_trace_loop(demo, [run], [], options, loaded)
    with torch.inference_mode():
        facts = attention_facts(loaded.model, closed.passages[0].ids[None])
    (made,) = GenerateJob(closed, facts, [], loaded.tokenizer, frozenset(), 30).generated(closed.passages[0], [run])
    ids = torch.tensor([*closed.passages[0].ids[: sequence.prompt].tolist(), *made])
    kinds = kinds_of_text(loaded.tokenizer, ids.tolist())
    assert len(made) == 30 and (kinds[sequence.prompt :] == 1).any() and (kinds[sequence.prompt :] == 0).any()
    decoded = decode(loaded.model, ids, run.plan, 1, prompt=sequence.prompt, kinds=kinds)
    assert decoded.logits[sequence.prompt - 1 : -1].argmax(-1).tolist() == made
    blind = torch.where(torch.arange(len(kinds)) < sequence.prompt, kinds, 0)
    other = decode(loaded.model, ids, run.plan, 1, prompt=sequence.prompt, kinds=blind)
    assert not torch.equal(torch.stack(other.leave), torch.stack(decoded.leave)), "classes of generated tokens matter"
    given = closed.given.generating(0, sequence.prompt, kinds_of_ids(loaded.tokenizer, loaded.text_config.vocab_size))
    later = given.kinds_at(0, sequence.prompt, ids[None, sequence.prompt :])[0, 0]
    assert torch.equal(later, kinds[sequence.prompt :])


def test_perplexity_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 2)
    options = PerplexityOptions(window=64, prompt=24, metrics=("retained_mass",))
    job = compile_perplexity(ModelSource("demo"), [tmp_path / "a.txt"], ["fastgen:recover=0.5"], "50%", options)
    assert all(len(passage.kinds) == passage.sequence.length for passage in job.closed.passages)
    found = job.execute(OutputOptions(tmp_path / "out"))
    assert found.residency(found.info.runs[0].run)["leave"].notna().any()
    without = compile_perplexity(ModelSource("demo"), [tmp_path / "a.txt"], ["h2o"], "50%", options)
    assert all(passage.kinds is None for passage in without.closed.passages), "computed for those who read them"


def test_what_has_no_classes_of_tokens_is_refused(tmp_path: Path, demo: Trace) -> None:
    np.savez(tmp_path / "maps.npz", attention=attention(0, 2, 2, 12).numpy()[:, None].astype(np.float32))
    imported = import_maps(tmp_path / "maps.npz", None, tmp_path / "imported", prompt_length=8)
    with pytest.raises(TraceError, match=r"fastgen needs token_kinds, which .* does not hold\nRecord it again with"):
        compile_replay(imported, ["fastgen"], "50%")
    ids = torch.from_numpy(demo.tokens(0)["token_id"].to_numpy(copy=True))
    with pytest.raises(UsageError, match=r"fastgen needs the classes of tokens, .*\nRecord a trace with kvscope trace"):
        decode(load(ModelSource("demo", device="cpu")).model, ids, plan("fastgen"), 9, prompt=20)


class WithoutSpecial:
    """A tokenizer of one's own, which does not say what is special."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        if name == "all_special_ids":
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)


def test_a_tokenizer_that_does_not_say_what_is_special(tmp_path: Path) -> None:
    loaded = load(ModelSource("demo", device="cpu"))
    (tmp_path / "prompt.txt").write_text(TEXT)
    pair = (loaded.model, WithoutSpecial(loaded.tokenizer))
    made = trace(pair, [tmp_path / "prompt.txt"], output=tmp_path / "trace", max_new_tokens=2)
    assert made.header.special_tokens is None
    with pytest.raises(TraceError, match="fastgen needs token_kinds"):
        compile_replay(made, ["fastgen"], "50%")


@pytest.mark.parametrize("name", ["recover", "frequent", "local"])
def test_shares_are_from_0_to_1(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}=1.5 is out of range"):
        parse_policy(f"fastgen:{name}=1.5")


def test_it_has_no_budget() -> None:
    assert not parse_policy("fastgen").traits.bounded
    with pytest.raises(UsageError, match="decides itself how many keys it evicts"):
        EvictionPlan.make(parse_policy("fastgen"), compress="prefill")
    with pytest.raises(UsageError, match="not defined for stream prefill"):
        plan("fastgen").require(Prefill.stream)
