"""Merging on eviction: how evicted keys and values are added to those that stay."""
