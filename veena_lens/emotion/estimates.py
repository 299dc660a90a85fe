"""How long a run will take: from eight timed answers, or before anything is loaded.

Both count answers alike (`answer_counts`). Without a model, the time of an answer follows from the number of weights
and from how fast this machine multiplies, which is measured in a fraction of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from veena_lens.emotion.pairs.parts import distinct, elsewhere, some_pairs, spaced, spread_examples
from veena_lens.emotion.settings import FIRST_BETA, Settings
from veena_lens.images.resizing import KINDS as resized_to
from veena_lens.regular_files import read_json

if TYPE_CHECKING:
    from veena_lens.checkpoints.loading import Checkpoint
    from veena_lens.model.model import HookedVLM

N_OWN, N_CHOSEN = 4, 3  # families of the method, and those of them that are asked of other images
N_BASELINES, N_KINDS = 9, 2  # `all_baselines`, and kinds of the adaptive family
SHARED = 0.25  # time of an answer that shares its prompt with others, against one alone
PATCHING = 1.5  # patching takes about half as long again as the answers
TIMED = 8  # answers, in one batch
BLOCK = 8e-4  # seconds of Python and small operations per block in a pass, whatever its size
TEMPLATE, CHARACTERS = 16, 4  # tokens of a chat template, and characters of a question per token
IMAGE = 576  # tokens of an image of which nothing is known


def answer_counts(n_layers: int, parts: Mapping[str, Any], settings: Settings) -> dict[str, int]:
    """Return how many answers a run generates, by stage; "injections" are those of the key layers that share prompts.

    What depends on findings is counted as usual: as many neurons as are asked for, the first trial that passes the
    other guards keeps the other answers right, and no two rankings are the same.

    Args:
        n_layers: the model's blocks.
        parts: pairs by the part of the run (`part_identities`).
        settings: the sizes of the run."""
    learned = list(some_pairs(parts["directions"], settings.direction_pairs))
    size = settings.batch_size
    n_layer_pairs = _bounded(len(parts["mechanism"]), settings.layer_pairs)
    validation = spread_examples(parts["validation"], settings.validation_pictures)
    test = spread_examples(parts["test"], settings.test_pictures)
    n_conditions = 2 + len(settings.strengths)
    n_rankings = len(settings.ways) * len(settings.modes)
    n_families = N_OWN + (N_BASELINES if settings.baselines else 0)
    asked = 0 if settings.attribute_harm is None else n_questions(validation, settings)
    random = settings.random_conditions
    random_names = [f"conflict, {strength}" for strength in settings.strengths]
    n_random = 1 + len(random_names) if random is None else len({"alone", *random_names} & set(random))
    side = len(test[: settings.asked_pictures])
    timed = 2 * (settings.latency_repeats + 1) * min(side, size)
    described = side if settings.describe and settings.templates else 0
    return {
        "directions": sum(len(distinct(learned[i : i + size])[0]) for i in range(0, len(learned), size)),
        "key layers": 2 * n_layer_pairs,
        "injections": 2 * n_layer_pairs * n_layers * len(settings.alphas),
        "choosing": len(validation) * n_conditions * (n_rankings + 1),
        "tuning": len(validation) * n_conditions * n_trials(settings) + (1 + n_families) * asked,
        "test": len(test) * (n_conditions * (n_families + 1) + N_CHOSEN * settings.random_draws * n_random)
        + (1 + N_CHOSEN) * sum(map(len, elsewhere(parts["elsewhere"], settings).values())),
        "side effects": (1 + n_families) * (timed + described + n_questions(test, settings)),
    }  # fmt: skip


def n_trials(settings: Settings) -> int:
    """Return how many methods are asked in tuning and for the doses, none twice, beyond those of the choice."""
    n, betas, gammas = settings.trials, settings.betas, settings.gammas
    others = [beta for beta in betas if beta != FIRST_BETA]
    vee = len(spaced(others, max(1, n - len(settings.ways) * len(settings.modes))))
    sizes = sorted({min(10, settings.k_neurons), settings.k_neurons})
    ena = spaced([(gamma, k) for gamma in gammas for k in sizes], n)
    veena = min(n, len(betas) * len(gammas[::2]))
    adaptive = min(n, len(betas[-4:]) * len(gammas[-3:-1] or gammas) * N_KINDS)
    doses = len(others) * len(settings.modes) - vee
    doses += sum((gamma, settings.k_neurons) not in ena for gamma in gammas)
    baselines = N_BASELINES * min(12, n) if settings.baselines else 0
    return vee + len(ena) + veena + adaptive + doses + baselines


def n_questions(examples: list[Any], settings: Settings) -> int:
    """Return how many other questions are asked about these images, or the first of them (`asked_pictures`)."""
    asked = examples[: settings.asked_pictures]
    return sum(name in e.attributes for e in asked for name in settings.questions or {})


def estimate(model: HookedVLM, parts: Mapping[str, Any], settings: Settings) -> str:
    """Return in words how many answers a run will take and how long, by timing eight answers.

    Args:
        model: the model that will be studied.
        parts: pairs by the part of the run (`part_identities`).
        settings: the sizes of the run."""
    from veena_lens.emotion import methods

    some = [p.emotional for p in list(parts["validation"])[:TIMED]]
    methods.generate_answers(model, some[:2], max_new_tokens=2)
    began = time.perf_counter()
    methods.generate_answers(model, some, batch_size=TIMED, max_new_tokens=settings.max_new_tokens)
    each = (time.perf_counter() - began) / max(1, len(some))
    counts = answer_counts(model.cfg.n_layers, parts, settings)
    total, taken = sum(counts.values()), time_text(seconds_of(counts, each))
    return (
        f"Preset {settings.preset}: about {taken} on this machine, {total} answers "
        f"({_detail(counts)}) at {each:.3f} s each, injections at a quarter, and half as long again for "
        "patching. A run that is stopped goes on where it was when it is started again."
    )


def dry_estimate(
    path: str, parts: Mapping[str, Any], settings: Settings, dtype: str | None = None, device: Any = None
) -> str:
    """Return in words the memory and time of a run, from a checkpoint's configuration and the headers of its files.

    Args:
        path: the checkpoint; no weights are read.
        parts: pairs by the part of the run (`part_identities`).
        settings: the sizes of the run.
        dtype: the name of the type of the weights, such as "bfloat16"; None: as stored.
        device: of the model; None is the CPU."""
    from veena_lens import checkpoints
    from veena_lens.checkpoints.describe import size_text, stored_weights

    name = checkpoints.base_of(path) if checkpoints.is_lora_folder(path) else path
    checkpoint = checkpoints.open_checkpoint(name, dtype=dtype)
    cfg, stored = checkpoint.cfg, stored_weights(checkpoint)
    n = _n_parameters(checkpoint) if stored.n_parameters is None else stored.n_parameters
    kind = checkpoints.dtype_of(dtype) or stored.dtype or torch.float32
    is_packed = stored.is_packed and dtype is None
    held = stored.n_bytes if is_packed else n * kind.itemsize
    prompt = prompt_tokens(checkpoint, parts)
    keys = 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head * kind.itemsize * prompt * settings.batch_size
    rows = settings.max_rows * (4 * cfg.d_model + 2 * cfg.d_mlp) * kind.itemsize
    counts = answer_counts(cfg.n_layers, parts, settings)
    where = torch.device("cpu" if device is None else device)
    speed = Speed.measured(where, kind)
    each = speed.seconds(n, cfg.n_layers, prompt, settings.max_new_tokens, kind.itemsize)
    work = seconds_of(counts, float(n) * (prompt + settings.max_new_tokens))
    named = str(kind).removeprefix("torch.")
    return "\n".join(
        [
            f"{path}: {parameters_text(n)} parameters, {cfg.n_layers} layers, {cfg.n_heads} heads",
            f"  weights, {named} ({'packed as' if is_packed else 'as' if dtype is None else 'not as'} stored): "
            f"{size_text(held)} on {where}",
            f"  keys and values of {settings.batch_size} prompts of about {prompt} tokens: {size_text(keys)}",
            f"  rows of a sweep ({settings.max_rows}): {size_text(rows)} at each position",
            f"  {sum(counts.values())} answers of {settings.max_new_tokens} tokens (preset {settings.preset}): "
            f"{_detail(counts)}",
            f"  about {time_text(seconds_of(counts, each))} on this machine ({where}, {speed.products:.2g} "
            f"multiply-adds a second), {time_text(work / 1e14)} at 1e14 a second (a large GPU, batched)",
            "Nothing was loaded. The run itself counts the same answers, times eight of them and prints a closer "
            "estimate.",
        ]
    )


def prompt_tokens(checkpoint: Checkpoint, parts: Mapping[str, Any]) -> int:
    """Return about how many tokens a prompt with its image has, of an example of the validation part.

    The processor itself is not loaded, which takes longer than everything else: its file says how images are resized.
    """
    example = next(iter(parts["validation"])).emotional
    picture = example.picture
    try:
        if hasattr(picture, "size"):
            width, height = picture.size
        else:
            with Image.open(picture) as opened:
                width, height = opened.size
        n_image = _image_tokens(checkpoint, height, width)
    except (ValueError, OSError, KeyError, TypeError):  # the run will say what is wrong with it
        n_image = IMAGE
    return n_image + TEMPLATE + round(len(example.prompt) / CHARACTERS)


def _image_tokens(checkpoint: Checkpoint, height: int, width: int) -> int:
    """Return about how many tokens an image of this size becomes."""
    cfg, vision = checkpoint.cfg, checkpoint.cfg.vision
    if vision is None:
        return 0
    if cfg.image_layout == "fixed":
        return vision.n_features
    found: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (checkpoint.path / name).is_file():
            found |= read_json(checkpoint.path / name)
    found |= found.pop("image_processor", None) or {}
    if cfg.image_layout == "dynamic":
        wanted = found.get("size") or {}
        least = wanted.get("shortest_edge") or found.get("min_pixels") or 1
        most = wanted.get("longest_edge") or found.get("max_pixels") or height * width
        side = vision.patch_size * vision.merge_size
        return round(min(max(height * width, least), most) / side**2)
    # Tiles, and the whole image as one more.
    sizes = resized_to[cfg.image_layout](cfg, SimpleNamespace(**found), (height, width), False)
    tall, wide = sizes[0] if cfg.image_layout == "anyres" else sizes[-1]
    return round((tall * wide / vision.image_size**2 + 1) * vision.n_features)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a device is.

    Attributes:
        products: multiply-adds per second of large products.
        bytes: per second, read from its memory.
    """

    products: float
    bytes: float

    @staticmethod
    @torch.no_grad()
    def measured(device: torch.device, dtype: torch.dtype) -> Speed:
        """Return the speed of a device, measured on a product and a sum."""
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width, rows = 1024, 256
        x, w = torch.ones(rows, width, **made), torch.ones(width, width, **made)
        large = torch.ones(2**23 // dtype.itemsize, **made)

        return Speed(
            products=rows * width**2 / _seconds(lambda: x @ w, device),
            bytes=2**23 / _seconds(large.sum, device),
        )

    def seconds(self, n_parameters: int, n_layers: int, prompt: int, new_tokens: int, itemsize: int) -> float:
        """Return the seconds of an answer in a batch of eight: its prompt at once, then token by token."""
        begin = TIMED * prompt * n_parameters / self.products + n_layers * BLOCK
        read, multiply = n_parameters * itemsize / self.bytes, TIMED * n_parameters / self.products
        step = max(read, multiply) + n_layers * BLOCK
        return (begin + new_tokens * step) / TIMED


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the shortest of three times of a run."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)


def seconds_of(counts: Mapping[str, int], each: float) -> float:
    """Return what all answers of a run cost, patching included, where one alone costs `each`."""
    shared = counts.get("injections", 0)
    return PATCHING * each * (sum(counts.values()) - shared + SHARED * shared)


def time_text(seconds: float | int) -> str:
    """Return a time in seconds, minutes or hours, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def parameters_text(n: int) -> str:
    """Return a number of parameters, in millions or billions where it is large."""
    if n < 10**6:
        return f"{n:,}"
    return f"{n / 1e6:.2f} million" if n < 10**9 else f"{n / 1e9:.2f} billion"


def _detail(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def _bounded(n: int, most: int | None) -> int:
    return n if most is None else min(n, most)


def _n_parameters(checkpoint: Checkpoint) -> int:
    """Return the number of parameters of the model that the configuration describes, without its weights."""
    from veena_lens.model.model import HookedVLM

    with torch.device("meta"):
        return HookedVLM(checkpoint.cfg).n_params_total
