"""The panels of the page, a file of data and a file of drawing each: a pair in this folder is found by itself."""
