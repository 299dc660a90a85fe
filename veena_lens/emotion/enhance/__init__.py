"""Enhance the circuit at inference (VEE, ENA, VEENA), beside the baselines and the random controls."""
