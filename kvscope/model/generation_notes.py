"""What a model's own generation settings ask for and a recording does not do."""

from __future__ import annotations

from kvscope.core.model_types import CausalModel

# Setting of a GenerationConfig -> values that change nothing, besides None.
IGNORED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "encoder_repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1, 1.0),
}


def generation_notes(model: CausalModel) -> tuple[str, ...]:
    """Return one line that names what the generation settings of a model ask for and is ignored; none if nothing is."""
    settings = getattr(model, "generation_config", None)
    asked = {name: getattr(settings, name, None) for name in IGNORED}
    named = [
        f"{name}={_short(value)}" for name, value in asked.items() if value is not None and value not in IGNORED[name]
    ]
    if not named:
        return ()
    return (f"the model's generation settings {', '.join(named)} are ignored: tokens are chosen by their logits alone",)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
