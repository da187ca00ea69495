"""Learned gates: the module and the file, what a policy needs of them."""
