"""Qwen3, text only: Qwen2 with norms of queries and keys instead of their biases."""

from __future__ import annotations

from model_adapters.decoders import TESTED, text_config, text_weights
from veena_lens.weight_map import Adapter

ADAPTER = Adapter(
    architecture="Qwen3ForCausalLM",
    read_config=text_config,
    weight_map=text_weights,
    hub_ids=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"),
    note="text only",
    tested=TESTED,
)
