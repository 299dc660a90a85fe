"""Checkpoints whose weights are stored in few bits: what config.json says of it, and what running them takes.

Two packages' forms are read, bitsandbytes' (4 and 8 bits) and torchao's; weights stay packed in memory and the
package's own kernel multiplies them. Everything is checked before any weight is read.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

METHODS = ("bitsandbytes", "torchao")


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantised: a package's name and its settings in config.json."""

    method: str
    settings: Mapping[str, Any]

    @property
    def told(self) -> str:
        """The method with the setting that says most of it."""
        for name in ("load_in_4bit", "load_in_8bit"):
            if self.settings.get(name):
                return f"{self.method} ({name}=True)"
        kind = self.settings.get("quant_type")
        kind = kind.get("default", kind) if isinstance(kind, Mapping) else kind
        kind = kind.get("_type", kind) if isinstance(kind, Mapping) else kind
        return f"{self.method} (quant_type={kind!r})"


def scheme_of(hf_config: Any) -> Scheme | None:
    """What `quantization_config` of a Hugging Face configuration asks for; None without one.

    Raises: ValueError for a method that is not read, with what to do."""
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return None
    settings = dict(settings if isinstance(settings, Mapping) else settings.to_dict())
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # files of 2023 leave the name out
    method = getattr(method, "value", method)
    if method not in METHODS:
        raise ValueError(
            f"The weights are quantised by {method!r} (quantization_config={settings!r}); weights of "
            f"{' and '.join(METHODS)} are read. Give such a checkpoint, or one of float weights."
        )
    return Scheme(method, settings)


def as_if_float(hf_config: Any) -> Any:
    """The configuration of the same model in float weights: what the model computes is not the packing's matter."""
    if getattr(hf_config, "quantization_config", None) is None:
        return hf_config
    plain = copy.deepcopy(hf_config)
    del plain.quantization_config
    return plain


def require_usable(scheme: Scheme, devices: Collection[torch.device], where: str) -> None:
    """Raises: ValueError where the package is missing, or does not run on a device that weights go to."""
    told = f"The weights of {where} are quantised by {scheme.told}"
    if find_spec(scheme.method) is None:
        raise ValueError(
            f"{told}, and {scheme.method} is not installed: `pip install {scheme.method}`, or give a checkpoint of "
            "float weights."
        )
    if scheme.method == "bitsandbytes":
        import bitsandbytes  # type: ignore[import-not-found]

        runs_on = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
        other = sorted({d.type for d in devices} - set(runs_on) - {"meta"})
        if other:
            raise ValueError(
                f"{told}; bitsandbytes {bitsandbytes.__version__} runs on {', '.join(sorted(runs_on))}, not on "
                f"{', '.join(other)}: pass another device, install a newer bitsandbytes, or give a checkpoint of float "
                "weights."
            )
