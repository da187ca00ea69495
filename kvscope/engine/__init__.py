"""The step that both loops share: cache state, scores, eviction, metrics of a block."""
