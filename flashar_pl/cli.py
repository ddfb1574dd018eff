"""The `flashar` command: one table of verbs, and a dispatcher that imports a verb's code only when it is called.

Neither torch nor Lightning is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from flashar_pl.console import Missed, closest
from flashar_pl.files import interrupted
from flashar_pl.integrity import SWITCH


@dataclass(frozen=True)
class Command:
    """One verb."""

    target: str
    """"module:function" below flashar_pl.commands."""
    summary: str
    """One line for `flashar --help`."""
    trains: bool = False
    """True: the function takes the verb and the raw arguments, for LightningCLI; False: a typed function."""


COMMANDS: dict[str, Command] = {
    "demo": Command("demo:demo", "run the whole experiment on the embedded digits: data, training, report"),
    "tokenize digits": Command("tokenize:tokenize_digits", "write the embedded digits as shards of codes"),
    "tokenize moving-digits": Command("tokenize:tokenize_moving_digits", "write videos of the digits as shards"),
    "tokenize scenes": Command("tokenize:tokenize_scenes", "write the embedded scenes, text to image, as shards"),
    "tokenize images": Command("tokenize:tokenize_images", "a folder of your own pictures as shards of codes"),
    "tokenize imagenet": Command("tokenize:tokenize_imagenet", "image folders or tars as shards of codes"),
    "tokenize text-image": Command("tokenize:tokenize_text_image", "captioned images as shards of codes"),
    "tokenize check": Command("tokenize:tokenize_check", "verify shards and draw decoded samples"),
    "tokenize samples": Command(
        "tokenize:tokenize_samples", "a model's own samples as shards of codes, without images"
    ),
    "tokenize npy": Command("tokenize:tokenize_npy", ".npy code files and labels as shards of codes"),
    "tokenizer train": Command("tokenizer:tokenizer_train", "train a small VQ tokenizer on your own pictures"),
    "classifier": Command("classifier:classifier", "train the small classifier behind FID and accuracy of tiny images"),
    "fit": Command("fit:fit", "train a raster model or post-train FlashAR, from a YAML in experiments/", trains=True),
    "validate": Command("fit:fit", "losses, likelihood and FID on the validation split", trains=True),
    "test": Command("fit:fit", "losses, likelihood and FID on the test split", trains=True),
    "predict": Command("fit:fit", "per-image likelihoods of the test split", trains=True),
    "generate": Command("generate:generate", "sample images from a checkpoint"),
    "evaluate": Command("evaluate:evaluate", "FID, Inception Score, precision, recall of a checkpoint's samples"),
    "evaluate geneval": Command(
        "evaluate_geneval:evaluate_geneval", "GenEval of text-to-image checkpoints: images and score"
    ),
    "evaluate scenes": Command("evaluate_scenes:evaluate_scenes", "what the images of the embedded scenes show"),
    "score": Command("score:score", "likelihood of held-out images under any checkpoint and decoding plan"),
    "serve": Command("serve:serve", "draw images over HTTP, with a page that compares both decoding orders"),
    "doctor": Command("doctor:doctor", "what this machine has, and whether decoding computes right on it"),
    "probe": Command("probe:probe", "which layers a vertical head would use, to choose the branch layer"),
    "benchmark": Command("benchmark:benchmark", "time decoding against the hardware's limit and raster decoding"),
    "benchmark train": Command("benchmark_train:benchmark_train", "time and memory of a training step of both stages"),
    "plan": Command("plan:plan", "memory, time and decoding floor of a training run, by arithmetic"),
    "convert": Command("convert:convert", "turn official or Lightning checkpoints into model directories and back"),
    "checkpoint verify": Command("checkpoint:checkpoint_verify", "compare checkpoints with the checksums they carry"),
    "plot": Command("plot:plot", "convergence curves of training runs, and a table of their results and settings"),
    "animate": Command("animate:animate", "raster and diagonal decoding side by side as an animation"),
    "reproduce": Command("reproduce:reproduce", "the commands behind every row of the paper's tables and figures"),
    "compare": Command("compare:compare", "runs on the same held-out images: paired differences with standard errors"),
    "sweep": Command("sweep:sweep", "the training runs of one file, over settings and seeds, and their comparison"),
    "report": Command("report:report", "compare raster, FlashAR and training-free decoding in one table"),
}

HELP = """\
flashar: post-train raster autoregressive image generators to decode one anti-diagonal of the code grid per step.

usage: flashar COMMAND [options]        flashar COMMAND --help

{commands}

options:
  --help        this text; after a command: its options
  --version     print the version
  --traceback   show where an error comes from (or set FLASHAR_DEBUG=1)
  --no-verify   read checkpoints without comparing their checksums (or set FLASHAR_NO_VERIFY=1)

start here:
  flashar demo  # everything on 1,797 small images, about 6 minutes
  flashar fit --config experiments/demo_raster.yaml --trainer.default_root_dir runs/mine  # one training run
  flashar generate --checkpoint runs/demo/flashar/checkpoints/last.ckpt --classes 3,7 --out samples/

dashes and underscores are the same in every option: --num-images, --num_images, --trainer.max-steps
"""


IN_SLURM = (
    "This shell is inside a Slurm allocation: start the command with srun, or let it not see the allocation: env -u "
    "SLURM_NTASKS flashar ..."
)
"""What to do about Lightning's complaints about variables of Slurm."""


def main(argv: list[str] | None = None) -> int:
    """Run one command line (None = that of the process) and return its exit code: 0, 1 (a bound was missed), 2
    (wrong input) or 130 (interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("FLASHAR_DEBUG", "") not in ("", "0") or "--traceback" in words
    if "--no-verify" in words:
        os.environ[SWITCH] = "1"  # other ranks inherit it
    words = [at_home(word) for word in words if word not in ("--traceback", "--no-verify")]
    try:
        return dispatch(words)
    except SystemExit as end:  # a help text was printed
        return int(end.code or 0)
    except Missed as missed:
        print(f"flashar: {missed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RuntimeError as error:  # an interrupt in the middle of torch.save surfaces as the writer's own error
        if interrupted(error):
            return 130
        if debug or "SLURM" not in str(error):
            raise
        print(f"flashar: error: {' '.join(str(error).split())} {IN_SLURM}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError) as error:
        if debug or (getattr(error, "name", None) or "").startswith("flashar_pl"):  # a missing module of ours: a bug
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"flashar: error: {' '.join(told(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def told(error: Exception) -> str:
    """The message of an error; the operating system's begins with the file."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    refused = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    advice = " If it is an output, choose another: --out, in fit --trainer.default_root_dir." if refused else ""
    return f"{error.filename}: {error.strerror}.{advice}"


def at_home(word: str) -> str:
    """A word with ~ in front of its path as the home directory, which a shell does not do in --option=~/x."""
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{name}{equals}{os.path.expanduser(value)}" if value.startswith("~/") else word


def dispatch(words: list[str]) -> int:
    """Find the verb, parse its options, call it."""
    if not words or words[0] in ("--help", "-h", "help"):
        print(HELP.format(commands=command_list(COMMANDS)))
        return 0
    if words[0] in ("--version", "-V"):
        from flashar_pl import __version__

        print(f"flashar-pl {__version__}")
        return 0
    name, rest = split_verb(words)
    function = load(COMMANDS[name])
    if COMMANDS[name].trains:
        return function(name, rest)
    from flashar_pl.commands.arguments import parse

    positional, options = parse(function, f"flashar {name}", rest)
    function(*positional, **options)
    return 0


def split_verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb (one or two words) and what follows.

    Raises:
        ValueError: no such verb; the closest ones are named.
        SystemExit: after printing a list of nested verbs.
    """
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name, words[length:]
    nested = {name: command for name, command in COMMANDS.items() if name.split()[0] == words[0]}
    if nested and (len(words) == 1 or words[1] in ("--help", "-h")):
        print(f"usage: flashar {words[0]} WHAT [options]        flashar {words[0]} WHAT --help\n")
        print(command_list(nested))
        raise SystemExit
    typed = " ".join(words[:2]) if nested else words[0]
    raise ValueError(f"no command {typed!r}; {closest(typed, nested or COMMANDS)} See flashar --help.")


def command_list(commands: dict[str, Command]) -> str:
    """One aligned line per verb."""
    return "\n".join(f"  {name:<19} {command.summary}" for name, command in commands.items())


def load(command: Command) -> Callable[..., Any]:
    """The function behind a verb."""
    return resolve_name(f"flashar_pl.commands.{command.target}")


if __name__ == "__main__":
    sys.exit(main())
