"""Real models: names, loading, and the hook that sees their attention. The only room that knows transformers."""
