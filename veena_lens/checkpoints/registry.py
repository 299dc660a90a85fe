"""Find adapters by architecture, through the entry-point group `veena_lens.adapters`.

Another package adds one in its own metadata. An entry point that fails to import raises an error only when its
architecture is requested; the others keep working. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from veena_lens.hook_table import near_names
from veena_lens.weight_map import Adapter

GROUP = "veena_lens.adapters"


def _own_entry_points() -> dict[str, str]:
    """Return our adapters, architecture -> "module:attribute", as pyproject.toml lists them.

    A checkout is read itself, because installed metadata may be missing or older than the code; without one, the
    metadata of the installed package holds the same table."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if table.get("name") == "veena-lens":
            return table["entry-points"][GROUP]
    return {point.name: point.value for point in entry_points(group=GROUP) if _is_ours(point)}


def _is_ours(point: EntryPoint) -> bool:
    return point.value.startswith("model_adapters.")


BUILT_IN = _own_entry_points()

# Architectures that need more than an adapter; the first matching pattern is reported.
_GEMMA_3N = (
    "four residual streams mixed around every block, embeddings per layer, keys and values shared between layers, "
    "sparse MLPs of nested widths, a MobileNet tower and an audio encoder"
)
WOULD_NEED = {
    "^Idefics2For": "a perceiver resampler, whose latent queries attend to the patches of an image",
    "^IdeficsFor": "gated cross-attention blocks between the decoder blocks, and a perceiver resampler",
    "^AriaFor": "a mixture of experts in each decoder block, and a projector that attends",
    "Gemma3n": _GEMMA_3N,
    "Moe": "a mixture of experts in its decoder blocks: a router, and many MLPs per layer",
    "Omni|Audio": "an audio tower, and tokens for sound in addition to images and text",
}


def _registered() -> dict[str, EntryPoint]:
    found = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    for point in entry_points(group=GROUP):
        if point.name not in BUILT_IN or not _is_ours(point):  # ours may come from metadata older than the code
            found[point.name] = point
    return found


def _load(point: EntryPoint) -> Adapter:
    module, _, attribute = point.value.partition(":")
    adapter = getattr(import_module(module), attribute)
    if not isinstance(adapter, Adapter):
        raise TypeError(f"{point.value} is a {type(adapter).__name__}, not an Adapter.")
    return adapter


def find_adapter(architecture: str) -> Adapter:
    """Return the adapter of a Hugging Face architecture.

    architecture: the class name in config.json, such as "LlavaForConditionalGeneration".

    Raises: ValueError for an unknown architecture, naming the known ones and how to add one; or for an entry point
    that cannot be imported, with the reason."""
    points = _registered()
    if architecture not in points:
        needs = next((what for name, what in WOULD_NEED.items() if re.search(name, architecture)), None)
        raise ValueError(
            f"No adapter for architecture {architecture!r}{near_names(architecture, points)}. "
            f"{f'It would need {needs}. ' if needs else ''}Known: "
            f"{', '.join(sorted(points))}. Another package can add one through the entry-point group {GROUP!r}: "
            "see docs/adapters.md."
        )
    point = points[architecture]
    try:
        return _load(point)
    except Exception as error:
        raise ValueError(f"The adapter of {architecture!r} ({point.value}) cannot be used: {_said(error)}") from error


def all_adapters() -> dict[str, Adapter]:
    """Return every adapter that can be imported, by architecture."""
    return {name: found for name, found in _all().items() if isinstance(found, Adapter)}


def broken_adapters() -> dict[str, str]:
    """Return the reason for each adapter that cannot be imported, by architecture."""
    return {name: _said(found) for name, found in _all().items() if isinstance(found, Exception)}


def adapter_sources() -> dict[str, str]:
    """Return where each adapter comes from, as "module:attribute", by architecture."""
    return {name: point.value for name, point in sorted(_registered().items())}


def _all() -> dict[str, Adapter | Exception]:
    """Return each adapter, or the error that its import raised."""
    out: dict[str, Adapter | Exception] = {}
    for name, point in sorted(_registered().items()):
        try:
            out[name] = _load(point)
        except Exception as error:  # an error in another package must not hide the rest
            out[name] = error
    return out


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
