"""The version of kvscope, in a file of its own: a room that states it need not import the whole package."""

__version__ = "0.1.0"
