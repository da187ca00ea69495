"""Names for the objects of transformers that the package passes on.

transformers has no types for what they hold: attributes of a model's configuration differ from model to model. So they
are `Any` to the type checker, here and nowhere else. No import of transformers: `kvscope.model` alone does that.
"""

from __future__ import annotations

from typing import Any, TypeAlias

CausalModel: TypeAlias = Any  # transformers.PreTrainedModel with a language modelling head
ModelConfig: TypeAlias = Any  # transformers.PreTrainedConfig
ModelOutput: TypeAlias = Any  # transformers.modeling_outputs.CausalLMOutputWithPast
Processor: TypeAlias = Any  # transformers.ProcessorMixin
Tokenizer: TypeAlias = Any  # transformers.PreTrainedTokenizerBase
KeyValueCache: TypeAlias = Any  # transformers.Cache
