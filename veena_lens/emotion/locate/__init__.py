"""Locate the circuit: steering vectors, key layers, key heads, key neurons (Adapt, Aggregate, Execute)."""
