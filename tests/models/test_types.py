"""The table of types is complete, and a sample of families behaves as it says (all of them: make check-models)."""

from pathlib import Path

import pytest

from kvscope.model.known_types import known_types, type_of
from tests.models.build import TYPES
from tests.models.probe import probe, record_of

FAMILIES = (
    "llama mistral mistral4 moshi xmod qwen3 gemma2 gemma3 phi3 gpt2 opt gpt_neox gpt_oss mixtral qwen3_moe "
    "deepseek_v3 minicpm3 hunyuan_vl qwen3_next falcon_h1 lfm2 minimax bert bloom falcon deepseek_v32 evolla gemma3n "
    "qwen2_5_vl mamba"
).split()


def test_every_type_of_transformers_is_in_the_table() -> None:
    missing, gone = sorted(set(TYPES) - set(known_types())), sorted(set(known_types()) - set(TYPES))
    assert (missing, gone) == ([], []), "run python tools/models.py TYPE --write for each new type, and look at it"


def test_what_the_table_promises() -> None:
    records = known_types().values()
    assert not [one.name for one in records if "crash" in (one.trace, one.replay, one.closed, one.verify)]
    assert not [one.name for one in records if one.trace == "differs"], "rows equal those of eager attention"
    assert {one.trace for one in records} == {"rows", "module rows", "refused"}, "every type was tried"
    fine = [one.name for one in records if (one.trace, one.closed, one.verify) == ("rows", "yes", "equal")]
    silent = [one.name for one in records if not one.remark and one.name not in fine]
    assert not silent, "what does not work has a reason"
    assert sum(one.trace in ("rows", "module rows") for one in records) >= 240
    assert type_of("llama") is not None and type_of("meta-llama/Llama-3.2-1B") is None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name: str, tmp_path: Path) -> None:
    known, found = known_types()[name], record_of(probe(name, tmp_path))
    assert {field: getattr(known, field) for field in found} == found
