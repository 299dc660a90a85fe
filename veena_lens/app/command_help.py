"""What `--help` says of each command beside its options: plain text, so that it is printed without a heavy import."""

from __future__ import annotations

from dataclasses import dataclass

PRESETS = """\
presets, each with the embedded images; --dry-run counts the answers of yours:
  tiny   a smoke test: 35 pairs for the directions, 16 test images, two trials per family, conflicts stated plainly,
         no baselines
  quick  the default: all pairs for the directions, 32 test images, four trials per family, conflicts stated plainly
         and strongly, baselines with as many trials
  full   the tables of the documentation: all pairs and test images, twelve trials per family, conflicts stated weakly,
         plainly and strongly, baselines with as many trials"""


@dataclass(frozen=True, kw_only=True)
class CommandHelp:
    """The words of a command: `line` in the list of commands, a description, examples, and what else follows them."""

    line: str
    about: str
    examples: tuple[str, ...]
    end: str = ""

    @property
    def epilog(self) -> str:
        """Return what stands below the options."""
        return "\n".join(
            ["examples:", *(f"  veena-lens {x}" for x in self.examples), *(["", self.end] * bool(self.end))]
        )


HELP = {
    "": CommandHelp(
        line="",
        about="Interpretability for vision-language models: caches, patching, steering.",
        examples=("demo", "explore", "run --preset tiny --dry-run"),
        end="`veena-lens COMMAND --help` describes a command, with its options and examples.",
    ),
    "models": CommandHelp(
        line="list the supported architectures, their adapters and typical hub ids",
        about="""\
List every architecture that can be loaded, those of installed packages too: its adapter, what was tested against
Hugging Face, and hub ids of checkpoints.""",
        examples=("models",),
    ),
    "inspect": CommandHelp(
        line="show configuration, hook points, parameters and memory of a checkpoint without loading weights",
        about="""\
Show what a checkpoint is before it is loaded: configuration, hook points with their shapes, parameters by part, and
the memory of the weights in each dtype. No weight is read.""",
        examples=("inspect tiny-llava-emotion", "inspect llava-hf/llava-1.5-7b-hf"),
    ),
    "verify": CommandHelp(
        line="compare a checkpoint with Hugging Face and edit every hook point once",
        about="""\
Certify a checkpoint: logits, padded rows and greedy answers against Hugging Face's own model, and an edit of every
hook point, which must have an effect. Both models are loaded. The exit code is 1 where something differs.""",
        examples=(
            "verify tiny-llava-emotion --dtype float64",
            "verify FOLDER --image a.jpg --image b.jpg --device cuda",
        ),
    ),
    "demo": CommandHelp(
        line="describe faces with the embedded models, show attention, patch and steer",
        about="""\
Write a page that looks inside models on embedded faces: answers, attention over the image, a logit lens, patching and
steering. Nothing is downloaded for the embedded models.""",
        examples=("demo", "demo --model tiny-llava-emotion --out out/llava"),
    ),
    "run": CommandHelp(
        line="locate a model's emotion circuit, enhance it and evaluate it; writes report.html",
        about="""\
Run the whole method on a model and pairs of images: directions, key layers, heads and neurons; strengths chosen on
validation people; an evaluation on people that were held out. Writes report.html, results.json and
circuit.safetensors. A run that is stopped goes on when the same command is given again.""",
        examples=(
            "run --preset tiny --out out/tiny",
            "run --model tiny-qwen2vl-emotion --dry-run",
            "run --model llava-hf/llava-1.5-7b-hf --device cuda --dtype bfloat16 --pairs my_pairs --preset full",
        ),
        end=PRESETS,
    ),
    "enhance": CommandHelp(
        line="describe an image with and without a saved circuit",
        about="Ask a model about images, once as it is and once with a circuit that a run saved; print both answers.",
        examples=("enhance --circuit out/veena/circuit.safetensors --image face.jpg",),
    ),
    "results": CommandHelp(
        line="print a table from a results.json as Markdown",
        about="Print one table of what a run found, from the results.json that it wrote.",
        examples=("results out/veena/results.json", "results out/veena/results.json --part layers"),
    ),
    "explore": CommandHelp(
        line="explore a model in the browser, with your own images",
        about="""\
Serve a page on which a model is asked about images and looked into: attention, logit lens, patching, neurons,
steering. It listens on this machine only unless --host says otherwise.""",
        examples=("explore", "explore --model llava-hf/llava-1.5-7b-hf --device cuda --dtype bfloat16"),
    ),
    "mer-unibench": CommandHelp(
        line="check the folders of MER-UniBench, answer a set, score answer files",
        about="""\
Work with the nine sets of MER-UniBench, which are not part of this package: see which are there, answer one with a
model, score answers by its rules.""",
        examples=("mer-unibench check /data/mer", "mer-unibench answer --help"),
    ),
    "mer-unibench check": CommandHelp(
        line="report which of the nine sets are in a folder, and how to get the others",
        about="Report which of the nine sets are in a folder and whether they are whole, and how to get the others.",
        examples=("mer-unibench check /data/mer", "mer-unibench check /data/mer --folder meld=/data/meld"),
    ),
    "mer-unibench score": CommandHelp(
        line="score an answer file, or every one in a folder",
        about="""\
Score answers to the sets by the benchmark's metrics, under the official mapping of labels to sectors and the direct
one, with means over the sets.""",
        examples=(
            "mer-unibench score answers.jsonl --root /data/mer",
            "mer-unibench score results --root /data/mer --wheels /data/wheels",
        ),
    ),
    "mer-unibench answer": CommandHelp(
        line="ask a model about every clip of a set; a stopped run resumes",
        about="""\
Ask a model about every clip of a set, from its frames and its subtitle, and write one answer per line. The same
command goes on where a stopped one was.""",
        examples=(
            "mer-unibench answer /data/mer --model llava-hf/llava-1.5-7b-hf --set meld --out meld.jsonl --device cuda",
        ),
    ),
}
