"""Learned gates: the module and its file, which the policy ``attention-gate`` uses."""
