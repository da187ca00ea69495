"""Presses of an installed kvpress: which can be followed, and what they retain. The only room that imports kvpress."""
