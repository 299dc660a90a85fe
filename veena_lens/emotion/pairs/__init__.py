"""Pairs of an emotional and a neutral image: the data set, readers of files, checks, context sentences."""
