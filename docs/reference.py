"""Write docs/reference/*.md, one entry a public name; mkdocs calls it before every build, so no page is ever old.

The pages name objects only; mkdocstrings reads signatures and docstrings from the source.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).parent / "reference"
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
            "inputs.Spans",
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
        "Many patched or steered runs of one input, and what is measured in each.",
        ("sweeps",),
        ("sweeps.metrics",),
    ),
    "circuits": (
        "Circuits",
        "Heads, neurons, lenses, attribution, knockout, occlusion, probes, and how sure it is.",
        ("circuits",),
        (),
    ),
    "emotion": ("Emotion", "Pairs, directions, words and wheels, methods and their rivals.", ("emotion",), ()),
    "checkpoints": (
        "Checkpoints and adapters",
        "Files, processors and the embedded models; how an architecture is mapped.",
        ("checkpoints",),
        ("checkpoints.verify.verify", "checkpoints.verify.Certificate", "weight_map.Adapter", "weight_map.WeightMap"),
    ),
    "plots": (
        "Figures and views",
        "Static figures, figures to hover over, and the explorer's view.",
        ("plots", "app.view"),
        ("plots.interactive",),
    ),
}


def objects_of(package: str) -> list[str]:
    """Where each public name of a package is defined, as veena_lens.module.name, in the order of modules."""
    module = import_module(f"veena_lens.{package}")
    found = [getattr(module, name) for name in module.__all__]
    return sorted({f"{it.__module__}.{it.__qualname__}" for it in found if hasattr(it, "__qualname__")})


def page(name: str) -> str:
    """The text of one page."""
    title, about, packages, further = PAGES[name]
    names = [path for package in packages for path in objects_of(package)]
    names += [f"veena_lens.{path}" for path in further]
    return f"# {title}\n\n{about}\n\n" + "\n\n".join(f"::: {path}" for path in dict.fromkeys(names)) + "\n"


def on_pre_build(config: object = None) -> None:
    """mkdocs's event: write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES:
        (FOLDER / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    on_pre_build()
