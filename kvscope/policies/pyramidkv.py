"""PyramidKV: SnapKV with more keys for the first layers and fewer for the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvscope.policies.base import policy
from kvscope.policies.citation import Citation
from kvscope.policies.snapkv import SnapKV


@policy("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Retain the keys that the last rows of the prompt attend to; the budget shrinks from layer to layer.

    The score is SnapKV's. The budget is allocated as by ``--allocate pyramid``: in addition to the window, a layer gets
    from about twice the mean (the first) to a twentieth of it (the last). arXiv:2406.02069, section 4.2; code
    Zefan-Cai/KVCache-Factory, ``PyramidKVCluster``. In that code the budget decreases by whole keys from layer to
    layer, so it uses up to one key per layer more. Here the total is that of the uniform allocation.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .1, .3], [.1, .5, .2, .2]]
    >>> held("pyramidkv:window=1,pooling=none", rows, budget=2, prompt=4)[-1]  # one layer: as snapkv
    [1, 3]
    """

    allocate: ClassVar[str] = "pyramid"
    formula: ClassVar[str] = "S[j] = pool(sum of w_q[j] over the last `window` rows); budgets fall from layer to layer"
    paper: ClassVar[str] = "arXiv:2406.02069 section 4.2"
    citation: ClassVar[Citation] = Citation(
        key="cai2024pyramidkv",
        title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        authors=(
            "Cai, Zefan and Zhang, Yichi and Gao, Bofei and Liu, Yuliang and Liu, Tianyu and Lu, Keming and Xiong, "
            "Wayne and Dong, Yue and Chang, Baobao and Hu, Junjie and Xiao, Wen"
        ),
        year=2024,
        arxiv="2406.02069",
    )
    proven: ClassVar[str] = "authors' decisions"
