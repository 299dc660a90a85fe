"""Check the numbers in a checkpoint's JSON files before anything is built from them.

A count sets how much is built, so that it needs an upper limit; a scale that is zero, negative or not a number would
make every output meaningless. Fields are known by their names wherever they stand in a file; null leaves the default.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from veena_lens.regular_files import read_json

SIDE = 2**14  # pixels
PIXELS = 2**27
# Field -> (least, most) of a whole number; a list of such numbers is checked one by one.
_COUNTS = {
    (0, 1000): "num_hidden_layers num_layers n_layer n_layers depth encoder_layers decoder_layers",
    (1, 4096): "num_attention_heads num_heads num_key_value_heads patch_size temporal_patch_size spatial_merge_size "
    "merge_size scale_factor num_channels in_channels in_chans",
    (1, 2**16): "head_dim mm_tokens_per_image image_size",
    (1, 2**20): "hidden_size embed_dim intermediate_size out_hidden_size d_model",
    (1, 2**24): "vocab_size num_position_embeddings",
    (1, 2**31): "max_position_embeddings original_max_position_embeddings",
    (0, 2**31): "sliding_window window_size",
    (0, 2**16): "num_experts num_local_experts n_routed_experts num_experts_per_tok",
    (0, 2**20): "image_seq_length image_seq_len num_image_tokens num_additional_image_tokens",
}
COUNTS = {name: limits for limits, names in _COUNTS.items() for name in names.split()}
POSITIVE = {"rope_theta", "rope_local_base_freq", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"}
POSITIVE |= {"beta_fast", "beta_slow", "query_pre_attn_scalar", "mlp_ratio"}
EPSILONS = {"rms_norm_eps", "layer_norm_eps", "norm_eps"}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
SIDES = ("height", "width")
EDGES = ("shortest_edge", "longest_edge")


def require_files(folder: Path) -> None:
    """Refuse a folder in which a pipe, a socket or a device stands in the place of a file.

    Links to files are what the hub's own cache consists of. Raises: ValueError."""
    for path in folder.iterdir():
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a link to nothing is reported where the file is needed
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{path} is not a regular file but a pipe, a socket or a device; remove it.")


def require_config(raw: Mapping[str, Any], where: str) -> None:
    """Check counts, epsilons and rotary numbers anywhere in a model's configuration.

    raw: the object in config.json.
    where: what messages call it.

    Raises: ValueError with the field, its value and what was expected."""
    for path, value in _fields(raw):
        name = path.rpartition(".")[2]
        if name in COUNTS:
            _require_all(value, whole(*COUNTS[name]), f"{where}: {path}")
        elif name in POSITIVE:
            _require_all(value, positive, f"{where}: {path}")
        elif name in EPSILONS:
            _require_all(value, epsilon, f"{where}: {path}")
        elif name == "image_grid_pinpoints":
            _require_pinpoints(value, f"{where}: {path}")


def require_processor(folder: Path) -> None:
    """Check the sizes and scales in a folder's processor files. Raises: ValueError, as `require_config`."""
    for file in PROCESSOR_FILES:
        if not (folder / file).exists():
            continue
        for path, value in _fields(read_json(folder / file)):
            name, where = path.rpartition(".")[2], f"{folder / file}: {path}"
            if name.endswith("size") and isinstance(value, Mapping):
                # Two edges are numbers of pixels (Qwen), one is a side.
                most = PIXELS if all(value.get(edge) is not None for edge in EDGES) else SIDE
                for part in (*SIDES, *EDGES):
                    _require_all(value.get(part), whole(1, most if part in EDGES else SIDE), f"{where}.{part}")
            elif name in ("size", "crop_size"):
                _require_all(value, whole(1, SIDE), where)
            elif name in ("min_pixels", "max_pixels"):
                _require_all(value, whole(1, PIXELS), where)
            elif name in COUNTS:
                _require_all(value, whole(*COUNTS[name]), where)
            elif name in ("image_std", "rescale_factor"):
                _require_all(value, positive, where)
            elif name == "image_mean":
                _require_all(value, finite, where)
            elif name == "image_grid_pinpoints":
                _require_pinpoints(value, where)


Rule = tuple[str, Callable[[Any], bool]]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int, most: int) -> Rule:
    """Return the rule of a whole number between two limits, both included."""
    return (
        f"a whole number from {least:,} to {most:,}",
        lambda value: type(value) is int and least <= value <= most,
    )


finite: Rule = ("a finite number", _is_number)
positive: Rule = ("a positive finite number", lambda value: _is_number(value) and value > 0)
epsilon: Rule = ("a finite number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)


def _require_all(value: Any, rule: Rule, where: str) -> None:
    """Check a number, or each of a list; null leaves the default."""
    expected, holds = rule
    for one in value if isinstance(value, list) else [value]:
        if one is not None and not holds(one):
            raise ValueError(f"{where} is {_short(value)}; expected {expected}.")


def _require_pinpoints(value: Any, where: str) -> None:
    expected, holds = whole(1, 2**16)
    pairs = value if isinstance(value, list) and len(value) <= 1000 else [value]
    for pair in pairs if value is not None else ():
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(holds, pair))):
            raise ValueError(f"{where} is {_short(value)}; expected a list of [height, width], each {expected}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field of nested objects with its path."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            here = f"{path}.{name}" if path else name
            yield here, inner
            yield from _fields(inner, here)
