"""The command line: one file for each command. Each parses, calls one function, prints and exits."""
