"""Replays: the step every policy goes through, its scoring, and what is kept of it."""
