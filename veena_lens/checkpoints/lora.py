"""Merge LoRA adapters (Hu et al. 2021, arXiv 2106.09685) at load: W + scaling B A, from the files that peft writes.

An adapter's file has two narrow matrices per tuned weight; their names, translated to today's, identify that weight.
Options beyond standard LoRA are rejected by name before any weight is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.checkpoints.files import WeightFile, download
from veena_lens.checkpoints.finite import FLOATS, require_finite
from veena_lens.checkpoints.limits import require_files
from veena_lens.regular_files import read_json
from veena_lens.weight_map import Adapter, WeightMap

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Read here, evident from the file itself, or for training only.
KNOWN = frozenset(
    """
    auto_mapping base_model_name_or_path bias exclude_modules inference_mode init_lora_weights
    layers_pattern layers_to_transform lora_alpha lora_dropout modules_to_save peft_type peft_version r rank_pattern
    alpha_pattern revision runtime_config target_modules task_type use_rslora megatron_core ensure_weight_tying
    qalora_group_size
    """.split()  # noqa: SIM905
)
# Initialisations that leave the base weights unchanged; others subtract the adapter's initial value from them.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", None)


@dataclass(frozen=True, eq=False)
class Lora:
    """Hold an adapter's configuration and its file; tensors are not read yet."""

    path: Path
    config: Mapping[str, Any]
    file: WeightFile

    def __repr__(self) -> str:
        return f"Lora({self.path}, r={self.config.get('r')}, lora_alpha={self.config.get('lora_alpha')})"


@dataclass(frozen=True, eq=False)
class Change:
    """Change one stored weight: add `scale` up @ down, or replace it by `whole`."""

    file: WeightFile
    down: str | None = None
    up: str | None = None
    scale: float = 1.0
    whole: str | None = None

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the changed weight in `dtype`; products in half precision are computed in float32."""
        if self.whole is not None:
            return self._read(self.whole).to(weight.device, dtype)
        assert self.down is not None and self.up is not None
        down, up = (_at_least_single(self._read(key)) for key in (self.down, self.up))
        return weight.to(dtype) + ((up @ down) * self.scale).to(weight.device, dtype)

    def _read(self, key: str) -> Tensor:
        (tensor,) = (tensor for _, tensor in self.file.tensors([key]))
        require_finite(tensor, key, str(self.file.path))
        return tensor


def _at_least_single(x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def is_lora_folder(name: str | Path) -> bool:
    """Return True for a folder with an adapter and without a model."""
    path = Path(name).expanduser()
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def base_of(name: str | Path) -> str:
    """Return the name of the model that an adapter was trained on. Raises: ValueError if the folder has none."""
    base = read_json(Path(name).expanduser() / CONFIG).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{name} does not name its base model (base_model_name_or_path); load the base with lora={str(name)!r}."
        )
    return str(base)


def open_lora(name: str | Path, revision: str | None = None) -> Lora:
    """Open an adapter; the names of its weights are checked later.

    name: a folder or a hub id with peft's files.
    revision: of the hub. None: the newest.

    Raises: FileNotFoundError without an adapter; ValueError for another kind of adapter or an unsupported option."""
    path = Path(name).expanduser()
    if not path.is_dir():
        if path.is_absolute() or str(name).count("/") != 1 or str(name).startswith((".", "~")):
            raise FileNotFoundError(f"No LoRA adapter {str(name)!r}: it is neither a folder nor a hub id.")
        path = download(str(name), revision, [CONFIG, *FILES])
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path} has no {CONFIG}; pass the folder that peft's save_pretrained wrote.")
    require_files(path)
    config = read_json(path / CONFIG)
    require_standard(config, path)
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path} has no weights ({' or '.join(FILES)}).")
    return Lora(path, config, WeightFile(found[0]))


def require_standard(config: Mapping[str, Any], where: Path) -> None:
    """Check that an adapter is standard LoRA. Raises: ValueError that names the other options."""
    _require_numbers(config, where)
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(
            f"{where} is an adapter of type {kind!r}; only LORA is supported. Merge it with peft and save the model."
        )
    odd = {k: v for k, v in config.items() if k not in KNOWN and v}
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        odd["init_lora_weights"] = start
    if odd:
        listed = ", ".join(f"{k}={v!r}" for k, v in odd.items())
        raise ValueError(
            f"{where}: {listed} is not supported, only W + scaling B A of linear maps (r, lora_alpha, use_rslora, "
            "their patterns, modules_to_save). Merge the adapter with peft (merge_and_unload) and save the model."
        )


# What peft writes, and simple expressions: names, dots, digits, alternatives, and at most two runs of any length.
_PATTERN = re.compile(
    r"\^?(?:[\w\-.]|\\\.|\\d|\[[\w\-]+\]|[(|)])(?:[\w\-.]|\\\.|\\d|\[[\w\-]+\]|[(|)]|(?<!\))[*+])*\$?"
)
MAX_PATTERN, MAX_RUNS = 256, 2


def _require_numbers(config: Mapping[str, Any], where: Path) -> None:
    """Check ranks, scales and patterns. Raises: ValueError that names the field and what was expected."""
    patterns: dict[str, dict[str, Any]] = {}
    for name in ("alpha_pattern", "rank_pattern"):
        found = config.get(name) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{where}: {name} is {found!r}; expected an object from module names to numbers.")
        patterns[name] = found
        for pattern in found:
            if (
                len(pattern) > MAX_PATTERN
                or sum(map(pattern.count, "*+")) > MAX_RUNS
                or not _PATTERN.fullmatch(pattern)
                or not _compiles(pattern)
            ):
                raise ValueError(
                    f"{where}: the pattern {pattern[:60]!r} in {name} is not supported; expected a module's name, or "
                    f"one with dots, \\d, [0-9], (a|b) and at most {MAX_RUNS} of * and +."
                )
    alphas = {"lora_alpha": config.get("lora_alpha", 8)} | patterns["alpha_pattern"]
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha == 0:
            raise ValueError(f"{where}: the alpha of {name} is {alpha!r}; expected a finite number other than 0.")
    for name, rank in ({"r": config.get("r", 8)} | patterns["rank_pattern"]).items():
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{where}: the rank of {name} is {rank!r}; expected a whole number of at least 1.")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def changes_of(
    lora: Lora, adapter: Adapter, weights: WeightMap, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Change]:
    """Return the changes that an adapter makes, by today's name of the stored weight.

    lora: the adapter.
    adapter, weights: how the base's weights are named.
    shapes: the shapes in the base's files.

    Raises: ValueError that lists every entry which does not fit a weight."""
    found = lora.file.shapes()
    stored = {key: shape for key, (shape, _) in found.items()}
    changes: dict[str, Change] = {}
    problems = [f"unknown   {key!r}: not the name of a weight" for key in stored if not key.isprintable()]
    problems += [f"quantised {key}: stored as {dtype}" for key, (_, dtype) in found.items() if dtype not in FLOATS]
    problems += [
        f"lone      {key}: without its lora_A"
        for key in stored
        if ".lora_B." in key and key.replace(".lora_B.", ".lora_A.") not in stored
    ]
    if problems:
        raise _misfit(lora, problems)
    for key, shape in stored.items():
        bare = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        module, kind, _ = _split(bare)
        if kind == "lora_B":
            continue
        name = adapter.normalize(f"{module}.weight" if kind == "lora_A" else bare)
        if kind not in ("lora_A", "whole"):
            problems.append(f"unknown   {key}: {kind} is not part of standard LoRA of linear maps")
        elif name not in weights.owners:
            problems.append(f"spare     {key}: {adapter.architecture} has no {name}{_of_tied(name)}")
        elif kind == "whole":
            changes[name] = Change(lora.file, whole=key)
            if shapes.get(name) != shape:
                problems.append(f"misshapen {key}: wanted {list(shapes.get(name, ()))}, found {list(shape)}")
        else:
            up = key.replace(".lora_A.", ".lora_B.")
            made = [*stored[up][:1], *shape[1:]] if up in stored and stored[up][1:] == shape[:1] else None
            if made != list(shapes.get(name, ())) or len(shape) != 2 or shape[0] == 0:
                found = "no lora_B" if up not in stored else f"{list(stored[up])} times {list(shape)}"
                problems.append(f"misshapen {key}: wanted a product of {list(shapes.get(name, ()))}, found {found}")
            else:
                changes[name] = Change(lora.file, key, up, _scale(lora.config, module, shape[0]))
    if not changes and not problems:
        problems.append("empty     the adapter changes no weight")
    if problems:
        raise _misfit(lora, problems)
    return changes


def _misfit(lora: Lora, problems: list[str]) -> ValueError:
    listed = "\n  ".join(problems)
    return ValueError(f"The LoRA adapter {lora.path} does not fit ({len(problems)} entries):\n  {listed}")


def _split(key: str) -> tuple[str, str, str]:
    """Split an entry's name into module, kind ("lora_A", "lora_B", ... or "whole") and rest."""
    found = re.fullmatch(r"(?:(.*?)\.(lora_\w+))?(.*)", key)
    module, kind, rest = found.groups("") if found else ("", "", key)
    return (module, kind, rest) if kind else (key.rpartition(".")[0], "whole", "")


def _of_tied(name: str) -> str:
    return " (it is tied to the embedding)" if name == "lm_head.weight" else ""


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return lora_alpha / r, or lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732), with alpha per module."""
    alpha = config.get("lora_alpha", 8)
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = other
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
