"""Adapters: each maps a Hugging Face architecture's configuration and weights to the native model."""
