"""In which panel of the help an option is shown, by the name of its parameter."""

from __future__ import annotations

OTHER = "Options"
ALONE = (
    "axes",
    "kv_heads",
    "learned_sinks",
    "system",
    "cite",
    "replay",
    "dry_run",
    "on",
)  # of one command each: in OTHER
PANELS: dict[str, tuple[str, ...]] = {
    "Policies": (
        *("policy", "budget", "prefill", "compress", "allocate", "scope", "accumulate", "cache", "merge", "positions"),
        *("grid", "gate", "per", "metric", "held_out"),
    ),
    "Model": (
        *("model", "revision", "dtype", "quantize", "device", "device_map", "trust_remote_code"),
        *("query_block", "prefill_chunk"),
    ),
    "Text": (
        *("chat", "system", "chat_option", "field", "template", "answer", "image", "continuation", "text"),
        *("window", "max_windows", "prompt_length", "prompt", "length", "number", "haystack", "prompts"),
    ),
    "Generation": ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "seed"),
    "What is stored": ("store", "layers", "heads", "query_stride", "hidden", "outputs", "reread"),
    "What is measured": (
        *("perplexity", "generate", "score", "tokens", "sequences", "tolerance", "decisions", "first", "trace"),
        *("span", "at", "sequence", "no_verify", "verify"),
    ),
    "Training": (
        *("distill", "target_keep", "eviction_loss", "strength", "head_size", "tau", "sinks", "steps", "rate"),
        *("every", "patience", "ramp", "resume", "scorer_width", "epochs"),
    ),
    "Table": ("sort", "top", "columns", "wide", "everything", "form", "long", "markdown"),
    "Figure": ("panel", "against", "layer", "head", "step", "style", "width", "height", "font_size"),
    "Output": ("output", "force", "update", "title", "data_only", "to", "json", "quiet"),
}
_OF = {name: title for title, names in PANELS.items() for name in names}


def panel_of(name: str) -> str:
    """Return the title of the panel of a parameter."""
    return _OF.get(name, OTHER)
