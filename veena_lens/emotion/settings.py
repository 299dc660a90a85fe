"""How much of everything a run does: presets from a smoke test to the tables of a paper."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

MODES = ("scale", "renorm")
FIRST_BETA = 3.0  # at which rankings of heads and modes are compared
WAYS = ("patching", "conflict gradient", "alone gradient", "intention")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and grids of one run. Numbers of pairs and images are upper bounds; None takes all there are.

    tau, alphas, k_heads, k_neurons: as method and paper name them. trials: settings tried for every family on the
    validation split, our own and baselines alike. random_draws: matched random components, judged under
    random_conditions (None: alone and every conflict). ways, modes: how heads are ranked and act. lead_in: put before
    the answer wherever states are read, so that the last token is where the emotion is said next; None reads at the
    last prompt token, as the paper does. events: context sentences by emotion in place of the built-in ones. questions:
    a question for each attribute of the images, to see whether other answers stay right; describe, templates: a
    question for a description, and how it words each attribute; asked_pictures: of at most so many images.
    attribute_harm: how large a share of those other answers a strength may cost on validation (None: not asked there).
    latency_repeats: pairs of runs that time a method.
    """

    preset: str = "quick"
    tau: float | int = 0.5
    minimum: int = 8
    alphas: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)
    scale: str = "relative"
    direction_pairs: int | None = None
    mechanism_pairs: int | None = 56
    layer_pairs: int | None = 28
    conflict_examples: int | None = 48
    validation_pictures: int | None = 16
    test_pictures: int | None = 64
    k_heads: int = 10
    k_neurons: int = 30
    betas: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
    gammas: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0, 5.0, 8.0)
    trials: int = 8
    ways: tuple[str, ...] = WAYS[:3]
    modes: tuple[str, ...] = MODES
    questions: dict[str, str] | None = None
    describe: str | None = None
    templates: dict[str, list[str]] | None = None
    asked_pictures: int | None = None
    attribute_harm: float | None = 0.05
    latency_repeats: int = 5
    baselines: bool = True
    random_draws: int = 20
    random_conditions: tuple[str, ...] | None = None
    depth: int = 2
    strengths: tuple[str, ...] = ("weak", "plain", "strong")
    events: dict[str, list[str]] | None = None
    question: str | None = None
    lead_in: str | None = "The person feels"
    max_new_tokens: int = 16
    batch_size: int = 16
    max_rows: int = 256
    draws: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("k_heads", "k_neurons", "trials", "max_new_tokens", "batch_size", "max_rows", "draws", "minimum")
        for name in (*sizes, "latency_repeats", "asked_pictures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Settings: {name}={value} must be at least 1.")
        if self.random_draws < 0:
            raise ValueError(f"Settings: random_draws={self.random_draws} must not be negative.")

    def for_study(self) -> dict[str, Any]:
        """Return the settings that a `Study` holds, by its names; the seed of a run is not that of the judgement."""
        names = ("lead_in", "batch_size", "max_new_tokens", "draws")
        return {name: getattr(self, name) for name in names}

    def as_json(self) -> dict[str, Any]:
        """Return the settings as results.json holds them, where `baselines` is called "rivals"."""
        return {{"baselines": "rivals"}.get(name, name): value for name, value in asdict(self).items()}


PRESETS: dict[str, Settings] = {
    "tiny": Settings(
        preset="tiny", minimum=2, alphas=(0.4, 1.6), direction_pairs=35, mechanism_pairs=14, layer_pairs=7,
        conflict_examples=14, validation_pictures=8, test_pictures=16, betas=(2.0, 5.0), gammas=(2.0, 5.0), trials=2,
        ways=WAYS[:2], modes=("scale",), random_draws=2, baselines=False, depth=1, draws=200, strengths=("plain",),
        random_conditions=("conflict, plain",), asked_pictures=4, latency_repeats=1,
    ),
    "quick": Settings(
        ways=WAYS[:2], trials=4, betas=(1.5, 2.0, 3.0, 5.0, 8.0), gammas=(1.5, 2.0, 3.0, 5.0), test_pictures=32,
        strengths=("plain", "strong"), random_conditions=("conflict, plain",), alphas=(0.2, 0.4, 0.8, 1.6),
        layer_pairs=14, mechanism_pairs=35, conflict_examples=32, asked_pictures=12, latency_repeats=1,
    ),
    "full": Settings(
        preset="full", mechanism_pairs=None, layer_pairs=49, conflict_examples=192, validation_pictures=24,
        test_pictures=None, ways=WAYS, trials=12, random_conditions=("conflict, plain",),
        max_new_tokens=20,
    ),
}  # fmt: skip


def settings_for(preset_name: str, seed: int | None = None, question: str | None = None, **questions: Any) -> Settings:
    """Return a preset with what was chosen for a run.

    Args:
        preset_name: the preset.
        seed: of every draw; None keeps the preset's.
        question: asked in place of the pairs' own; None keeps those.
        questions: `questions`, `describe` and `templates`, where the images' attributes are to be asked for.

    Raises: ValueError for an unknown preset."""
    chosen = {"seed": seed, "question": question, **questions}
    return replace(preset(preset_name), **{name: value for name, value in chosen.items() if value is not None})


def preset(name: str) -> Settings:
    """Return a preset by name. Raises: ValueError for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; presets: {', '.join(PRESETS)}.")
    return PRESETS[name]
