"""Mistral, text only: the same class of model without a tower."""

from __future__ import annotations

from model_adapters.decoders import TESTED, text_config, text_weights
from veena_lens.weight_map import Adapter

ADAPTER = Adapter(
    architecture="MistralForCausalLM",
    read_config=text_config,
    weight_map=text_weights,
    hub_ids=("mistralai/Mistral-7B-Instruct-v0.2",),
    note="text only",
    tested=TESTED,
)
