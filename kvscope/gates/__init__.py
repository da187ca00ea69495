"""Learned gates, which the policy ``attention-gate`` uses: module and file; filters, which ``q-filters`` uses."""
