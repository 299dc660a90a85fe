"""Adapters map the configuration and weights of Hugging Face architectures to the native model."""
