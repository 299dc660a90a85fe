"""Train a small model in three stages: the tower alone, alignment with short answers, the full mix.

Each step seeds its own data, and the state is saved regularly: a stopped run resumes. A stage ends after its steps or
its minutes, whichever comes first, and the learning rate follows that progress. Steps, images, minutes and last loss of
each stage are stored next to the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from veena_lens.zoo.architecture import Architecture, Stage, pack
from veena_lens.zoo.llava import LLAVA
from veena_lens.zoo.model import ARCHITECTURES, checkpoint_folder
from veena_lens.zoo.pictures import Face, compose, recolour
from veena_lens.zoo.samples import HEAD_CLASSES, Faces, Writer, head_labels

__all__ = ["Trainer", "answer_loss", "learning_rate", "main", "write_record"]


def write_record(
    work: Path, folder: Path, batches: dict[str, int], seed: int, device: str, threads: int, decoder_from: str = "none"
) -> None:
    """Write `training.json` into the checkpoint folder from the run's log."""
    last: dict[str, dict[str, float]] = {}
    for line in (work / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        last[entry["stage"]] = entry
    stages = [
        {
            "stage": name,
            "steps": int(entry["step"]),
            "pictures": int(entry["step"]) * batches[name],
            "minutes": entry["minutes"],
            "loss": entry["loss"],
        }
        for name, entry in last.items()
    ]
    where = f"{threads} threads on {os.cpu_count()} {platform.machine()} cores" if device == "cpu" else device
    record = {"seed": seed, "where": where, "decoder_from": decoder_from, "stages": stages}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


HEAD_WEIGHTS = {"emotion": 2.0, "brows": 2.5, "background": 0.3, "hair": 0.5, "glasses": 0.5, "beard": 0.5}

# Of the tower's additional images during the text stages.
EXTRA_WEIGHT = 0.1
COLOUR_HEADS = torch.tensor([name in ("hair", "background") for name in HEAD_CLASSES])


class Heads(nn.Module):
    """Classify image features with linear heads, so that the tower learns the attributes before any text.

    They read the mean feature and, with `places`, also the concatenated features of an image with that many, because a
    mean hides a thin line in one place."""

    def __init__(self, width: int, places: int = 0) -> None:
        super().__init__()
        self.places = places
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(classes)) for name, classes in HEAD_CLASSES.items()})
        if places:
            self.placed = nn.ModuleDict(
                {name: nn.Linear(places * width, len(classes)) for name, classes in HEAD_CLASSES.items()}
            )

    def loss(
        self, features: Float[Tensor, "batch image width"], labels: Int[Tensor, "batch head"]
    ) -> Float[Tensor, ""]:
        total = self._loss(self.heads, features.mean(1), labels)
        if self.places == features.shape[1]:
            total = total + self._loss(self.placed, features.flatten(1), labels)
        return total

    @staticmethod
    def _loss(
        heads: nn.ModuleDict, features: Float[Tensor, "batch width"], labels: Int[Tensor, "batch head"]
    ) -> Float[Tensor, ""]:
        total = features.new_zeros(())
        for column, (name, head) in enumerate(heads.items()):
            if (labels[:, column] >= 0).any():
                total = total + HEAD_WEIGHTS.get(name, 1.0) * F.cross_entropy(head(features), labels[:, column])
        return total


class Trainer:
    """Train a model, with the state of its stages in `work`; `run` completes the stages that are not done."""

    def __init__(
        self,
        work: Path,
        seed: int = 0,
        styles: dict[str, float] | None = None,
        identities: int | None = None,
        device: str | None = None,
        architecture: Architecture = LLAVA,
        decoder_from: Path | None = None,
    ) -> None:
        self.work, self.seed, self.architecture = work, seed, architecture
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = architecture.build_processor()
        model: Any = architecture.build_model(self.processor, seed)
        if decoder_from is not None:
            if architecture.start_from is None:
                raise ValueError(f"{architecture.name} cannot start from another decoder; leave out the start.")
            architecture.start_from(model, self.processor.tokenizer, decoder_from)
        self.teacher = architecture.open_teacher(decoder_from) if architecture.open_teacher and decoder_from else None
        self.model = model.to(self.device)
        self.faces = Faces("train", work.parent / "drawings", styles or architecture.styles, identities)
        self.writer = Writer(self.processor.tokenizer, architecture.chat)
        config: Any = self.model.config
        torch.manual_seed(seed + 1)
        self.heads = nn.ModuleDict(
            {
                "tower": Heads(architecture.tower_width(self.model), architecture.head_places),
                "alignment": Heads(config.text_config.hidden_size),
                "mix": Heads(config.text_config.hidden_size),
            }
        ).to(self.device)
        work.mkdir(parents=True, exist_ok=True)

    def run(self, stages: tuple[Stage, ...] | None = None, save_every: int = 250, folder: Path | None = None) -> None:
        for stage in stages or self.architecture.stages:
            self.run_stage(stage, save_every)
            if folder is not None:
                self.architecture.save_folder(self.model, self.processor, folder)

    def run_stage(self, stage: Stage, save_every: int = 250, stop_after: int | None = None) -> None:
        """Continue a stage to its end (or `stop_after` steps, for tests)."""
        names = dict.fromkeys((stage.name, "tower") if stage.extra else (stage.name,))
        parameters = [*self.model.parameters(), *(p for name in names for p in self.heads[name].parameters())]
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=stage.peak_lr,
            betas=(0.9, 0.98),
        )
        path = self.work / f"{stage.name}.pt"
        step, seconds = 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True, map_location=self.device)
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            step, seconds = state["step"], state["seconds"]
            if state["done"]:
                return
            optimizer.load_state_dict(state["optimizer"])
        began, losses = time.monotonic() - seconds, []
        self.model.train()
        while True:
            seconds = time.monotonic() - began
            progress = max(step / stage.steps, seconds / 60 / stage.minutes)
            done = progress >= 1
            if done or (step and step % save_every == 0):
                if losses:
                    self.report(stage, step, seconds, sum(losses) / len(losses))
                    losses.clear()
                self.save(path, optimizer, step, seconds, done)
            if done or step == stop_after:
                return
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(stage, step, progress)
            with torch.autocast(self.device, torch.bfloat16, enabled=stage.bfloat16):
                loss = self.loss(stage, step, progress)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1

    def loss(self, stage: Stage, step: int, progress: float) -> Float[Tensor, ""]:
        """Return the loss on the data of one step."""
        rng = random.Random(f"{self.seed} {stage.name} {step}")
        if stage.name == "tower":
            return self.tower_loss(stage, stage.batch, rng)
        faces, square, labels = self.pictures(stage.batch, rng)
        pixels = self.architecture.reshape(square, rng)
        grid = self.architecture.grid(*pixels.shape[2:])
        if stage.name == "alignment":
            rows = [self.writer.alignment_row(face, rng, grid) for face in faces]
        else:
            rows = [self.writer.mixed_row(face, rng, grid, early=progress < stage.early) for face in faces]
        packed = pack(rows, self.processor.tokenizer.pad_token_id).to(self.device)
        ran = self.architecture.run(self.model, packed, pixels)
        loss = answer_loss(self.model, ran.hidden, packed.input_ids, packed.weights)
        heads = cast("Heads", self.heads[stage.name])
        loss = loss + stage.head_weight * heads.loss(ran.features, labels)
        return loss + EXTRA_WEIGHT * self.tower_loss(stage, stage.extra, rng) if stage.extra else loss

    def tower_loss(self, stage: Stage, count: int, rng: random.Random) -> Float[Tensor, ""]:
        """Return the loss of the linear heads on images without text, and the distance to a teacher's features."""
        _, square, labels = self.pictures(count, rng, self.architecture.recoloured)
        pixels = self.architecture.reshape(square, rng)
        features = self.architecture.tower_features(self.model, pixels)
        heads = cast("Heads", self.heads["tower"])
        loss = heads.loss(features, labels)
        if self.teacher is not None and stage.imitation and pixels.shape == square.shape:
            loss = loss + stage.imitation * distance(features, self.teacher(square))
        return loss

    def pictures(
        self, count: int, rng: random.Random, recoloured: float = 0.0
    ) -> tuple[list[Face], Float[Tensor, "batch 3 height width"], Int[Tensor, "batch head"]]:
        """Return faces, their images in [-1, 1] and the classes of the heads."""
        drawn = self.faces.draw(rng, count)
        faces = [face for face, _ in drawn]
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        pictures = compose(drawn, generator)
        labels = torch.tensor([head_labels(face) for face in faces])
        if recoloured:
            pictures, changed = recolour(pictures, recoloured, generator)
            labels[changed[:, None] & COLOUR_HEADS] = -100
        return faces, ((pictures - 0.5) / 0.5).to(self.device), labels.to(self.device)

    def save(self, path: Path, optimizer: torch.optim.Optimizer, step: int, seconds: float, done: bool) -> None:
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": {} if done else optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
            "done": done,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def report(self, stage: Stage, step: int, seconds: float, loss: float) -> None:
        """Print a line of progress and append it to `log.jsonl`."""
        line = {"stage": stage.name, "step": step, "minutes": round(seconds / 60, 2), "loss": round(loss, 4)}
        print(json.dumps(line), flush=True)
        with (self.work / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def distance(
    features: Float[Tensor, "batch image d_model"], target: Float[Tensor, "batch image d_model"]
) -> Float[Tensor, ""]:
    """Return the mean squared error in units of each target feature's variance."""
    features, target = features.float(), target.float()
    error, spread = (features - target).pow(2).mean((0, 1)), target.var((0, 1))
    return (error / (spread + 1e-6)).mean()


def answer_loss(
    model: Any,
    hidden: Float[Tensor, "batch pos d_model"],
    ids: Int[Tensor, "batch pos"],
    weights: Float[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """Return the weighted mean cross-entropy of the tokens with a weight; logits are computed only for those."""
    chosen = weights[:, 1:] > 0
    chosen_weights = weights[:, 1:][chosen].to(hidden.device)
    logits = model.lm_head(hidden[:, :-1][chosen.to(hidden.device)])
    losses = F.cross_entropy(logits, ids[:, 1:][chosen].to(hidden.device), reduction="none")
    return (losses * chosen_weights).sum() / chosen_weights.sum()


def learning_rate(stage: Stage, step: int, progress: float) -> float:
    """Return the learning rate: a hundred steps of warm-up, then a cosine to one fiftieth."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return stage.peak_lr * min(1.0, (step + 1) / 100) * cosine


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m veena_lens.zoo.train", description=__doc__)
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), default=LLAVA.name)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished checkpoint")
    parser.add_argument("--work", type=Path, help="folder for the resumable state (default: .cache/zoo/MODEL)")
    parser.add_argument(
        "--minutes", type=float, help="divide this time among the stages instead of running all their steps"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument(
        "--decoder-from",
        default=LLAVA.name,
        help="checkpoint whose decoder a model of another architecture starts from: embedded name, folder, or 'none'",
    )
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    architecture = ARCHITECTURES[options.model]
    work, source = options.work or Path(".cache/zoo") / options.model, None
    if architecture.start_from is not None and options.decoder_from != "none":
        source = checkpoint_folder(options.decoder_from)
    stages = architecture.stages
    if options.minutes:
        stages = tuple(replace(stage, minutes=options.minutes * architecture.shares[stage.name]) for stage in stages)
    trainer = Trainer(work, options.seed, architecture=architecture, decoder_from=source)
    trainer.run(stages, folder=options.out)
    batches = {stage.name: stage.batch for stage in stages}
    where = "none" if source is None else source.name
    write_record(work, options.out, batches, options.seed, trainer.device, torch.get_num_threads(), where)


if __name__ == "__main__":
    main()
