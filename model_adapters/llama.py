"""Llama, text only: the same class of model without a tower."""

from __future__ import annotations

from model_adapters.decoders import TESTED, text_config, text_weights
from veena_lens.weight_map import Adapter

ADAPTER = Adapter(
    architecture="LlamaForCausalLM",
    read_config=text_config,
    weight_map=text_weights,
    hub_ids=(
        "meta-llama/Llama-3.1-8B-Instruct",
        "lmsys/vicuna-7b-v1.5",
    ),
    note="text only",
    tested=TESTED,
)
