"""Clairvoyant eviction schedules: the best that any policy could do."""
