"""The page ``docs/kvpress.md``: how presses are written, what can be followed, and what is refused."""

from __future__ import annotations

from kvscope.presses.support import REFUSED, SUPPORTED

_PAGE = """\
# Bring your press

Written by `python tools/docs.py`.

You can use a press of [kvpress](https://github.com/NVIDIA/kvpress) as a policy. Write it as in Python, with the
parameters of its class:

<!-- not run: it needs kvpress, which needs another version of transformers -->
```sh
pip install 'kvscope[kvpress]'
kvscope trace --model demo prompt.txt -o presses --store maps+vectors
kvscope replay presses --policy "kvpress:SnapKVPress(window_size=32,kernel_size=5)" --policy snapkv:window=32
kvscope replay presses --policy "kvpress:AdaKVPress(press=ExpectedAttentionPress())" --budget 20%,50%
kvscope replay presses --perplexity --policy "kvpress:KeyDiffPress()" --policy keydiff
kvscope verify presses --policy "kvpress:KeyDiffPress()"
kvscope policies kvpress
```

This is a replay of three of them, on the first 386 tokens of the bundled model's prompt and 32 generated tokens:

```
policy                                               budget  keys   held  retained mass  output error  ideal cosine
kvpress:SnapKVPress(window_size=32, kernel_size=5)      20%    78   94.5          0.571         0.366         0.761
kvpress:SnapKVPress(window_size=32, kernel_size=5)      50%   193  209.5          0.744         0.209         0.867
kvpress:AdaKVPress(press=ExpectedAttentionPress())      20%    78   94.5          0.510         0.841         0.695
kvpress:AdaKVPress(press=ExpectedAttentionPress())      50%   193  209.5          0.728         0.377         0.829
snapkv(window=32)                                       20%    78   94.5          0.571         0.366         0.761
snapkv(window=32)                                       50%   193  209.5          0.744         0.209         0.867
```

`kvscope verify presses --policy "kvpress:KeyDiffPress()" --budget 20%` prints:

```
policy                  budget  keys  largest cache  tokens  same evictions  logits differ by  verdict
kvpress:KeyDiffPress()     20%    78            110      32             all           5.3e-15  equal
```

kvpress 0.5 needs transformers 5.2, which supports fewer types of models than newer versions. If you need both, install
kvpress in a separate environment. `make test-kvpress` builds one, and compares every press with its live run.

## What is run

A press scores keys with the modules of a model, from hidden states, keys, values and rows of the prompt. So kvscope
loads the model of the trace, in the open loop too. The model reads each prompt once for every press and budget, with
the hooks of kvpress: the class, its `score`, its `compress` and its top-k are those of the installed kvpress. A hook
cuts the cache of a layer after that layer has attended, so an eviction in one layer does not affect another: the pass
is that of the full cache, as for every policy with full prefill. kvscope then reads which keys of each head are left in
the cache and visible to later queries, and follows this choice: in the open loop over the recorded rows, in the closed
loop, in `verify`, and when it generates answers. As in kvpress, nothing is evicted after the prompt. A press works with
every `--store`.

- kvscope restores the model, its modules, the attention functions of transformers (which kvpress replaces when it is
  imported) and the state of the random number generators. Traces and closed loops have the same bytes before and after.
- The attention kernel is `sdpa`, or `eager` for `ObservedAttentionPress`, which needs the rows. A press can compute its
  scores differently if it receives rows.
- Random draws start from seed 0 at every prompt, unless the press has a `seed`.
- The precision is that of the trace's model; `--dtype` of `kvscope replay --perplexity` changes it.
- kvscope refuses prompts with images, models without `model.layers[..].self_attn`, streaming prefill, and layers with a
  sliding window that a press would cut.

## Budgets and ratios

kvpress retains `n_kept = max(1, int(P * (1 - compression_ratio)))` keys of a prompt of `P` tokens.

- **Without a ratio in the press, the budget decides.** A budget of `B` keys sets the ratio to `1 - B / P`, or to the
  next smaller number that gives `n_kept = B`: for 20 of 100 keys, `1 - B / P` is 0.8, which gives 19. So at one budget,
  a press retains as many keys of a prompt as a policy of kvscope. The ratios 0.5 and 0.8 retain as many keys as the
  budgets `int(P * (1 - 0.5))` and `int(P * (1 - 0.8))`. A budget of `20%` is `ceil(0.2 * P)` keys; the ratio 0.8 can
  retain one key less.
- **With a ratio in the press, the ratio decides**: `kvpress:SnapKVPress(compression_ratio=0.8)`, or for a wrapper
  `kvpress:AdaKVPress(press=SnapKVPress(compression_ratio=0.8))`. The press runs as it is; `--budget` does not change
  it, and the report shows the keys that it held. Use this form to repeat a run of kvpress exactly, because the keys
  that `CompactorPress`, `CriticalKVPress` and `PyramidKVPress` retain also depend on the ratio itself.
- Some presses divide a budget, and some retain fewer keys than the budget; compare the keys *held*. Presses of the kind
  *own size* have no budget.

## What can be followed

We compared each press in this table with its live run in kvpress: at ratios of 0.5 and 0.8, both retain the same keys
in every layer and head of the bundled model (`tests/presses/test_live.py`). For six of them, we also compared the
logits of the closed loop with those of decoding with the cache that kvpress leaves: in float64 they differ by less than
1e-9 (`tests/presses/test_closed_loop.py`). Any other `ScorerPress` of the installed kvpress runs in the same way.

<!-- followed -->

## What is refused

<!-- refused -->
"""


def describe() -> str:
    """Return the page."""
    followed = ["| press | kind | a budget is | example |", "|---|---|---|---|"]
    followed += [f"| `{name}` | {it.kind} | {it.budget} | `{it.example}` |" for name, it in SUPPORTED.items()]
    refused = ["| press | why: the press | instead |", "|---|---|---|"]
    refused += [f"| `{name}` | {why} | {todo} |" for name, (why, todo) in REFUSED.items()]
    page = _PAGE.replace("<!-- followed -->", "\n".join(followed))
    return page.replace("<!-- refused -->", "\n".join(refused))
