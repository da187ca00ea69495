"""Traces and replays that are sent and fetched: packed into one file, or read from another machine."""
