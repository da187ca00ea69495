"""Models: names, loading, recording, and the hook into attention. The only room that imports transformers."""
