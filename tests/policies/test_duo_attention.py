"""DuoAttention against its plain-loop reference, and against the labels of the authors' code."""

import json
from pathlib import Path

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.policies.duo_attention import DuoAttention
from kvscope.policies.spec import parse_policy
from tests.engine.maps import run
from tests.policies.decisions import groups, head_sets
from tests.reference.policies.duo_attention import duo_attention, observed, quantile

SIZES = {"sinks": 2, "recent": 5}
# Two layers of two heads; their scores, and those of four query heads whose means these are.
SCORES = [[0.9, 0.1], [0.4, 0.6]]


def table(folder: Path, scores: list[list[float]] | None = None) -> str:
    file = folder / "heads.tsv"
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in scores or SCORES))
    return str(file)


@pytest.mark.parametrize("sparsity", [None, 0, 0.3, 0.5, 1])
@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.5])
def test_observed_labels_equal_the_plain_loop(threshold: float, sparsity: float | None) -> None:
    labels = set()
    for seed, (prompt, last) in enumerate([(20, 4), (12, 32), (7, 1), (26, 8)]):
        rows, cut = groups(seed, 4, 2, 2, 30)
        policy = DuoAttention(threshold=threshold, sparsity=sparsity, rows=last, **SIZES)
        simulation = run(policy, rows, [9], kv_heads=2, prompt=prompt, prefill="full")
        for layer in range(2):
            scores = [observed(cut[layer][head], prompt, last=last, **SIZES) for head in range(2)]
            lowest = threshold if sparsity is None else quantile(scores, sparsity)
            for head in range(2):
                expected = duo_attention(scores[head] < lowest, prompt, 30, "full", **SIZES)
                assert head_sets(simulation, layer, head)[1] == expected
                labels.add(scores[head] < lowest)
    assert labels == ({False, True} if sparsity not in (0, 1) and threshold != 0.2 else labels)


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(
    ("setting", "streaming"),
    [("threshold=0.5", {0.1, 0.4}), ("sparsity=0.3", {0.1}), ("sparsity=1", {0.1, 0.4, 0.6, 0.9})],
)
def test_labels_of_a_file(setting: str, streaming: set[float], prefill: str, tmp_path: Path) -> None:
    rows, _ = groups(1, 4, 2, 2, 30)
    policy = parse_policy(f"duo-attention:heads={table(tmp_path)},sinks=2,recent=5,{setting}")
    simulation = run(policy, rows, [9], kv_heads=2, prompt=12, prefill=prefill)
    for layer in range(2):
        for head in range(2):
            expected = duo_attention(SCORES[layer][head] in streaming, 12, 30, prefill, **SIZES)
            assert head_sets(simulation, layer, head)[1] == expected


def test_scores_of_query_heads_are_averaged_and_json_is_read(tmp_path: Path) -> None:
    rows, _ = groups(1, 4, 2, 2, 30)
    of_queries = [[0.8, 1.0, 0.0, 0.2], [0.3, 0.5, 0.5, 0.7]]
    (tmp_path / "heads.json").write_text(
        json.dumps(
            {
                f"{layer}-{head}": [score, score]
                for layer, row in enumerate(of_queries)
                for head, score in enumerate(row)
            }
        )
    )
    made = [
        run(
            parse_policy(f"duo-attention:heads={file},sinks=2,recent=5"),
            rows,
            [9],
            kv_heads=2,
            prompt=12,
            prefill="full",
        )
        for file in (table(tmp_path), tmp_path / "heads.json")
    ]
    assert torch.equal(made[0].state.leave, made[1].state.leave)


# Labels of mit-han-lab/duo-attention @fe93c31, `sparsify_attention_heads`, of a table of 3 layers with 4 heads.
TABLE = [[0.61, 0.0, 0.97, 0.68], [0.02, 0.96, 0.04, 0.33], [0.99, 0.12, 0.81, 0.45]]
PUBLISHED = {
    0.25: [[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]],
    0.5: [[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0]],
    0.8: [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
}


@pytest.mark.parametrize("sparsity", PUBLISHED)
def test_labels_are_those_of_the_authors_code(sparsity: float, tmp_path: Path) -> None:
    rows, _ = groups(1, 4, 4, 3, 30)
    policy = DuoAttention(heads=table(tmp_path, TABLE), sparsity=sparsity, **SIZES)
    held = run(policy, rows, [9], kv_heads=4, prompt=20, prefill="full").held(29, 30)[0, :, :, 0].sum(-1)
    assert (held == 30).int().tolist() == PUBLISHED[sparsity]


def test_what_is_refused(tmp_path: Path) -> None:
    for setting in ("sinks=-1", "recent=0", "rows=0", "sparsity=2"):
        with pytest.raises(UsageError, match=setting.split("=")[0]):
            parse_policy(f"duo-attention:{setting}")
    with pytest.raises(UsageError, match=r"2 layers with 2 heads, and the model has 4 with 2"):
        parse_policy(f"duo-attention:heads={table(tmp_path)}").fit((0,), 2, 4)
    parse_policy(f"duo-attention:heads={table(tmp_path)}").fit((0, 1), 2, 2)
    for name, text in [
        ("none.tsv", None),
        ("empty.tsv", ""),
        ("words.tsv", "a\tb\n"),
        ("uneven.tsv", "1\t2\n3\n"),
        ("x.json", '{"0-1": 1}'),
    ]:
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=name):
            parse_policy(f"duo-attention:heads={tmp_path / name}").fit((0,), 2, 2)
