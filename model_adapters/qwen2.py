"""Qwen2, text only: the same class of model without a tower."""

from __future__ import annotations

from model_adapters.decoders import TESTED, text_config, text_weights
from veena_lens.weight_map import Adapter

ADAPTER = Adapter(
    architecture="Qwen2ForCausalLM",
    read_config=text_config,
    weight_map=text_weights,
    hub_ids=(
        "Qwen/Qwen2-7B-Instruct",
        "Qwen/Qwen2.5-0.5B-Instruct",
    ),
    note="text only",
    tested=TESTED,
)
