"""Write docs/reference/*.md, with one entry per public name; mkdocs calls it before every build, so no page is stale.

The pages name objects only; mkdocstrings reads signatures and docstrings from the source.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "reference"
# A link from a page to a source file. It works in the repository; the site does not contain the sources.
SOURCE_LINK = re.compile(r"\[(`[^`\]]+`)\]\(\.\./[^)]+\)")
# What opens a sentence of a docstring that describes a parameter, an attribute, the result, errors or the source.
DESCRIBED = re.compile(
    r"(^<p>|(?<=[.;)>])\s+)((?:\*{0,2}[a-z]\w*(?:, \*{0,2}[a-z]\w*)*|Raises|Source): |Returns (?=[A-Z]))"
)
# Page -> (title, one line about it, packages whose public names it lists, further objects of veena_lens).
PAGES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "model": (
        "Model, inputs and cache",
        "Load, prepare, run, hook, cache, generate.",
        (),
        (
            "model.model.HookedVLM",
            "model.hooks.HookedRoot",
            "model.text.TextInterface",
            "model.weights.StackedWeights",
            "inputs.MultimodalInputs",
            "spans.Spans",
            "activation_cache.ActivationCache",
            "activation_cache.MissingActivation",
            "scores.Scores",
            "config.HookedVLMConfig",
            "config.VisionConfig",
            "config.ConnectorConfig",
            "config.RopeConfig",
        ),
    ),
    "interventions": ("Interventions", "Edits as data; `model.intervene` applies them.", ("interventions",), ()),
    "sweeps": (
        "Sweeps",
        "Many patched or steered runs of one input, and the metrics measured in each.",
        ("sweeps",),
        ("sweeps.metrics",),
    ),
    "circuits": (
        "Circuits",
        "Heads, neurons, lenses, attribution, knockout, occlusion, probes, and their statistics.",
        ("circuits",),
        (),
    ),
    "emotion": ("Emotion", "Pairs, directions, words and wheels, methods and their baselines.", ("emotion",), ()),
    "checkpoints": (
        "Checkpoints and adapters",
        "Files, processors and the embedded models; adapters for architectures.",
        ("checkpoints",),
        ("verify.verify", "verify.Certificate", "weight_map.Adapter", "weight_map.WeightMap"),
    ),
    "plots": (
        "Figures and views",
        "Static figures, interactive figures, and the explorer's view.",
        ("plots", "app.view"),
        ("plots.interactive",),
    ),
}


def objects_of(package: str) -> list[str]:
    """Return where each public name of a package is defined, as veena_lens.module.name, in the order of modules."""
    module = import_module(f"veena_lens.{package}")
    found = [getattr(module, name) for name in module.__all__]
    return sorted({f"{it.__module__}.{it.__qualname__}" for it in found if hasattr(it, "__qualname__")})


def parts_of_the_model() -> list[str]:
    """Return HookedVLM and those of its base classes that are defined here."""
    from veena_lens import HookedVLM

    return [f"{c.__module__}.{c.__qualname__}" for c in HookedVLM.__mro__ if c.__module__.startswith("veena_lens.")]


def page(name: str) -> str:
    """Return the text of one page."""
    title, about, packages, further = PAGES[name]
    names = parts_of_the_model() if name == "model" else []
    names += [path for package in packages for path in objects_of(package)]
    names += [f"veena_lens.{path}" for path in further]
    return f"# {title}\n\n{about}\n\n" + "\n\n".join(f"::: {path}" for path in dict.fromkeys(names)) + "\n"


def on_pre_build(config: object = None) -> None:
    """Write the pages when mkdocs begins a build; one that has not changed is left alone, since a server watches it."""
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES:
        path, text = FOLDER / f"{name}.md", page(name)
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, encoding="utf-8")


def on_page_markdown(markdown: str, **event: object) -> str:
    """Replace links to source files by their paths when mkdocs reads a page."""
    return SOURCE_LINK.sub(r"\1", markdown)


def on_page_content(html: str, page: Any, **event: object) -> str:
    """Begin a line with every parameter that a docstring of the reference describes."""
    if not page.file.src_uri.startswith("reference/"):
        return html

    def begin(found: re.Match[str]) -> str:
        start = "<p>" if found[1] == "<p>" else "<br>"
        return f"{start}<b>{found[2].strip().rstrip(':')}</b>{':' if ':' in found[2] else ''} "

    return re.sub(r"^<p>.*?</p>", lambda text: DESCRIBED.sub(begin, text[0]), html, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    on_pre_build()
