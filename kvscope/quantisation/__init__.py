"""Quantised caches: keys and values as codes of a few bits, what attention reads of them, and what they take."""
