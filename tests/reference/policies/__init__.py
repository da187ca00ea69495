"""Eviction rules in plain loops, written from their specification: one file for each policy."""
