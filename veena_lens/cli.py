"""Parse the command line of `veena-lens`; each command imports what it calls.

`--help` and `models` import neither torch nor transformers. Errors that a user can fix print one message and exit with
code 2; a certificate that fails exits with code 1.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from veena_lens.app.command_help import HELP

DTYPES = ("float64", "float32", "bfloat16", "float16")
CHECKPOINT = "an embedded checkpoint such as tiny-llava-emotion, a folder, or a hub id"


def _command(commands: Any, name: str, of: str = "") -> argparse.ArgumentParser:
    """Add a command, or an action of one, with the words of its help."""
    words = HELP[f"{of} {name}".strip()]
    form = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(
        name, help=words.line, description=words.about, epilog=words.epilog, formatter_class=form
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and options."""
    words = HELP[""]
    parser = argparse.ArgumentParser(
        prog="veena-lens",
        description=words.about,
        epilog=words.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="command")

    _command(commands, "models")

    inspect = _command(commands, "inspect")
    inspect.add_argument("path", help=CHECKPOINT)

    verify = _command(commands, "verify")
    verify.add_argument("path", help=CHECKPOINT)
    verify.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the comparison (default: float32)")
    verify.add_argument("--device", default="cpu", help="device of both models (default: cpu)")
    verify.add_argument(
        "--image", action="append", metavar="FILE", help="an image for the comparison; pass two or more"
    )

    demo = _command(commands, "demo")
    demo.add_argument("--out", default="out/demo", help="folder for the page and its figures (default: out/demo)")
    demo.add_argument("--model", nargs="+", help=f"{CHECKPOINT}; several are compared (default: all embedded ones)")

    run = _command(commands, "run")
    run.add_argument("--model", default="tiny-llava-emotion", help=f"{CHECKPOINT} (default: tiny-llava-emotion)")
    run.add_argument(
        "--pairs", metavar="DIR", help="folder of pairs with manifest.jsonl (default: the embedded images)"
    )
    run.add_argument(
        "--out",
        default="out/veena",
        help="folder for the results; the same command resumes a stopped run (default: out/veena)",
    )
    run.add_argument(
        "--preset",
        choices=("tiny", "quick", "full"),
        default="quick",
        help="size of the run, see below (default: quick)",
    )
    run.add_argument("--question", help="question about every image (default: that of the manifest)")
    run.add_argument("--seed", type=int, help="random seed of splits, draws and intervals (default: 0)")
    run.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="check the options, count answers, estimate memory and time; no weights are read",
    )
    run.add_argument("--device", help="device of the model (default: cpu)")
    run.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: as stored)")

    enhance = _command(commands, "enhance")
    enhance.add_argument("--circuit", metavar="FILE", required=True, help="circuit.safetensors from a run")
    enhance.add_argument("--image", metavar="FILE", required=True, action="append", help="an image; may be repeated")
    enhance.add_argument("--model", help=f"{CHECKPOINT} (default: the one that the circuit names)")
    enhance.add_argument("--question", help="the question (default: how does the person in the picture feel?)")
    enhance.add_argument("--max-new-tokens", type=int, default=64, help="longest answer in tokens (default: 64)")
    enhance.add_argument("--device", help="device of the model (default: cpu)")
    enhance.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: as stored)")

    results = _command(commands, "results")
    results.add_argument("path", help="results.json from a run")
    results.add_argument(
        "--part", default="main", help="main, summary, random, ways, tuned, effects, elsewhere, layers, heads"
    )

    explore = _command(commands, "explore")
    explore.add_argument(
        "--model", nargs="+", help=f"{CHECKPOINT}; the first is selected at the start (default: all embedded ones)"
    )
    explore.add_argument("--cache", metavar="FILE", help="open this activation cache without loading a model")
    explore.add_argument("--device", help="device of the models (default: cpu)")
    explore.add_argument("--dtype", choices=DTYPES, help="dtype of the models (default: as stored)")
    explore.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    explore.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    explore.add_argument("--max-upload-mb", type=float, default=10, help="largest upload in MB (default: 10)")
    explore.add_argument("--max-megapixels", type=float, default=24, help="largest image in megapixels (default: 24)")
    explore.add_argument(
        "--max-sweep-gb", type=float, default=2, help="memory for rows of a sweep that run together, in GB (default: 2)"
    )

    _add_mer_unibench(commands)

    for name, command in commands.choices.items():
        if name != "mer-unibench":  # its actions take them
            _add_common(command)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    """Add what every command takes; options of the whole program may also follow the command."""
    loudness = command.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="print the result alone: no progress, no warnings")
    loudness.add_argument("-v", "--verbose", action="store_true", help="print details, and what the libraries log")
    command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_mer_unibench(commands: Any) -> None:
    """Add the three actions on MER-UniBench."""
    parser = _command(commands, "mer-unibench")
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)

    check = _command(actions, "check", "mer-unibench")
    check.add_argument("root", help="folder that contains the folders of the sets")

    score = _command(actions, "score", "mer-unibench")
    score.add_argument(
        "path", help="npz, csv, JSON Lines, a folder of <name>.npy, or a folder of results-<key> folders"
    )
    score.add_argument("--root", help="folder that contains the folders of the sets, for the labels")
    score.add_argument("--set", metavar="KEY", help="the set of the answers (default: read from the path or file)")
    score.add_argument(
        "--mapping",
        choices=("official", "direct", "both"),
        default="both",
        help="mapping of labels to sectors (default: both)",
    )
    score.add_argument("--wheels", metavar="FOLDER", help="the benchmark's own wheels (default: those of this project)")
    score.add_argument(
        "--missing",
        choices=("error", "empty"),
        default="error",
        help="samples without an answer: raise an error, or score them as empty (default: error)",
    )

    answer = _command(actions, "answer", "mer-unibench")
    answer.add_argument("root", help="folder that contains the folders of the sets")
    answer.add_argument("--model", required=True, help=CHECKPOINT)
    answer.add_argument("--set", metavar="KEY", required=True, help="the set to answer")
    answer.add_argument("--out", metavar="FILE", required=True, help="JSON Lines file, one answer per line")
    answer.add_argument("--circuit", metavar="FILE", help="apply this saved circuit")
    answer.add_argument(
        "--frames", type=int, default=1, help="images per clip; with one it is the middle frame (default: 1)"
    )
    answer.add_argument("--faces", action="store_true", help="show aligned faces instead of frames")
    answer.add_argument("--no-subtitle", action="store_true", help="leave the subtitle out of the prompt")
    answer.add_argument("--batch-size", type=int, default=16, help="images per batch (default: 16)")
    answer.add_argument("--max-new-tokens", type=int, default=32, help="longest answer in tokens (default: 32)")
    answer.add_argument(
        "--missing",
        choices=("error", "skip"),
        default="error",
        help="clips without images: raise an error, or skip them (default: error)",
    )
    answer.add_argument("--device", help="device of the model (default: cpu)")
    answer.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: as stored)")
    for action in (check, score, answer):
        action.add_argument("--folder", action="append", metavar="KEY=FOLDER", help="the folder of a set outside ROOT")
        _add_common(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 for a failed certificate, 2 for bad input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from veena_lens import __version__

        print(f"veena-lens {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    _set_loudness(args)
    try:
        return COMMANDS[args.command](args)
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"veena-lens {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _set_loudness(args: argparse.Namespace) -> None:
    """Let warnings and the libraries' log messages through, or not, as --quiet and --verbose say."""
    if args.quiet:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    elif args.verbose:
        warnings.simplefilter("default")
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def models(args: argparse.Namespace) -> int:
    """Print every adapter, including those of other packages."""
    from veena_lens.checkpoints.registry import adapter_sources, all_adapters, broken_adapters

    sources = adapter_sources()
    for architecture, adapter in all_adapters().items():
        print(f"{architecture}  ({sources[architecture]})")
        if adapter.note:
            print(f"  {adapter.note}")
        if adapter.tested:
            print(f"  tested against Hugging Face: {adapter.tested}")
        for hub_id in adapter.hub_ids:
            print(f"  {hub_id}")
    for architecture, reason in broken_adapters().items():
        print(f"{architecture}  ({sources[architecture]}) cannot be used: {reason}")
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Print a checkpoint's description."""
    import torch

    from veena_lens.checkpoints.describe import describe
    from veena_lens.checkpoints.loading import open_checkpoint
    from veena_lens.model.model import HookedVLM

    checkpoint = open_checkpoint(args.path)
    with torch.device("meta"):
        model = HookedVLM(checkpoint.cfg)
    print(describe(checkpoint, model))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Print the certificate."""
    from veena_lens.model.model import HookedVLM
    from veena_lens.verify import verify as certify

    images: list[Any] | None = args.image
    model = HookedVLM.from_pretrained(args.path, dtype=args.dtype, device=args.device)
    certificate = certify(model, args.path, images=images, progress=not args.quiet)
    print(certificate)
    return 0 if certificate.passed else 1


def demo(args: argparse.Namespace) -> int:
    """Run the demo and print where its page is."""
    from veena_lens.app.demo import run_demo, run_demos
    from veena_lens.checkpoints.files import bundled_names

    models = args.model or bundled_names()
    silent = {"progress": False} if args.quiet else {}
    found = run_demo(args.out, model=models[0], **silent) if len(models) == 1 else run_demos(args.out, models, **silent)
    print(found.page if args.quiet else found)
    return 0


def explore(args: argparse.Namespace) -> int:
    """Serve the explorer until interrupted."""
    from veena_lens.app.explorer.server import serve
    from veena_lens.app.explorer.state import Limits
    from veena_lens.checkpoints import device_of, dtype_of

    limits = Limits(
        upload_bytes=_in_units("--max-upload-mb", args.max_upload_mb, 2**20),
        pixels=_in_units("--max-megapixels", args.max_megapixels, 10**6),
        sweep_bytes=_in_units("--max-sweep-gb", args.max_sweep_gb, 2**30),
    )
    loading: dict[str, Any] = {"device": device_of(args.device)}
    if args.dtype is not None:
        loading["dtype"] = dtype_of(args.dtype)
    serve(args.model, args.cache, args.host, args.port, limits, loading)
    return 0


def _in_units(option: str, value: float | int, unit: int) -> int:
    """Return an option's value in bytes or pixels. Raises: ValueError for less than one, or no number."""
    if not (math.isfinite(value) and value * unit >= 1):
        raise ValueError(f"{option} {value:g}: expected a positive number.")
    return int(value * unit)


def mer_unibench(args: argparse.Namespace) -> int:
    """Check, score or answer."""
    from veena_lens.app import commands as command

    folders = command.parse_folders(args.folder)
    if args.action == "check":
        from veena_lens.emotion.mer_unibench.scoring import check_root

        print(check_root(args.root, overrides=folders))
    elif args.action == "score":
        options = {"key": args.set, "mapping": args.mapping, "wheels": args.wheels, "missing": args.missing}
        print(command.score_path(args.path, args.root, overrides=folders, **options))
    else:
        print(command.answer_command(args))
    return 0


def run(args: argparse.Namespace) -> int:
    """Run the whole method, or say what it will take."""
    options: dict[str, Any] = {
        "preset_name": args.preset,
        "dtype": args.dtype,
        "device": args.device,
        "seed": args.seed,
        "question": args.question,
        "skip_unreadable": args.skip_unreadable,
    }
    if args.dry_run:
        from veena_lens.app.before_run import dry_run

        print(dry_run(args.model, args.pairs, args.out, **options))
        return 0
    from veena_lens.app.commands import run_command

    run_command(args.model, args.pairs, args.out, **options, quiet=args.quiet, verbose=args.verbose)
    return 0


def enhance(args: argparse.Namespace) -> int:
    """Describe one or more images with and without a circuit."""
    from veena_lens.app.commands import enhance_command

    enhance_command(
        args.circuit,
        args.image,
        model=args.model,
        question=args.question,
        max_new_tokens=args.max_new_tokens,
        device=args.device,
        dtype=args.dtype,
    )
    return 0


def results(args: argparse.Namespace) -> int:
    """Print one table of a run's results."""
    from veena_lens.app.commands import table_command

    return table_command(args.path, args.part)


COMMANDS = {
    "models": models,
    "inspect": inspect,
    "verify": verify,
    "demo": demo,
    "run": run,
    "enhance": enhance,
    "results": results,
    "explore": explore,
    "mer-unibench": mer_unibench,
}

if __name__ == "__main__":
    sys.exit(main())
