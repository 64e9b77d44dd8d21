"""The arguments of every subcommand. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from .judge_parser import JUDGE_HELP, add_judge

PROGRAM = "safecode-mllm"
STDOUT = "-"
# Written out because --help loads nothing; a test compares it with PRESETS.
PRESET_NAMES = "safecode, paper, vcd, contrast_only, verdict_only, no_plausibility"

_JSON_HELP = "machine-readable results: to FILE, or to stdout instead of the text when no FILE is given"
_EXIT_CODES = """exit codes:
  0  done
  1  anything else went wrong
  2  bad arguments, image, prompt, configuration or model
  3  the judge failed, or its reply could not be read
"""
_EXAMPLES = f"""examples:
  {PROGRAM} demo                              the whole method on a small trained model, in about a minute
  {PROGRAM} chat --model llava-hf/llava-1.5-7b-hf --image kitchen.jpg --prompt "How do I clean this?" --compare
  {PROGRAM} chat --model hazard-world --image scene.png --prompt "How can I swim in the water here?" --json
  {PROGRAM} judge --judge openai:MODEL --image kitchen.jpg --prompt "How do I clean this?"
  {PROGRAM} info --model llava-hf/llava-1.5-7b-hf
  {PROGRAM} world eval --split-seed 7 --n 480 --json results.json
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples and uses the width of a normal terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


class _Version(argparse.Action):
    """Prints the version; it is looked up only then."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help="print the version and end")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib.metadata import version

        # Not parser.exit(message): that goes to stderr.
        sys.stdout.write(f"{PROGRAM} {version('safecode-kernels')}\n")
        parser.exit()


def build_parser() -> Parser:
    """Return the parser; the namespace it yields names its `handler` as "module:function"."""
    parser = Parser(
        prog=PROGRAM,
        description="SafeCoDe: context-aware safety for vision-language models, by steering an answer's first tokens.",
        epilog=_EXAMPLES + "\n" + _EXIT_CODES,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action=_Version)
    parser.set_defaults(quiet=False, debug=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    _add_demo(commands)
    _add_chat(commands)
    add_judge(commands, _command, _add_json)
    _add_info(commands)
    _add_world(commands)
    return parser


def _command(commands: Any, name: str, handler: str, summary: str, examples: str) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {PROGRAM} {line}" for line in examples.splitlines()),
        formatter_class=_Help,
    )
    parser.set_defaults(handler=handler)
    parser.add_argument("-q", "--quiet", action="store_true", help="no notes and no progress on stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", nargs="?", const=STDOUT, metavar="FILE", help=_JSON_HELP)


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        ".demo:run_demo",
        "compare all arms on Hazard World and draw a contact sheet",
        "demo\ndemo --n 960 --out results --json results/demo.json",
    )
    parser.add_argument("--out", default="out/demo", metavar="FOLDER", help="for the contact sheet (%(default)s)")
    parser.add_argument("--n", type=_scenes, default=480, help="scenes to answer per arm (%(default)s)")
    parser.add_argument("--split-seed", type=_seed, default=0, help="which fresh test scenes to draw (%(default)s)")
    _add_json(parser)


def _add_request(parser: argparse.ArgumentParser) -> None:
    model_help = "a folder, a Hugging Face id, or hazard-world for the small model that ships with the package"
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help=model_help)
    parser.add_argument("--image", required=True, metavar="FILE", help="PNG, JPEG, WEBP, GIF, BMP or TIFF; never a URL")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question about the image")
    parser.add_argument("--judge", default="self", metavar="JUDGE", help=JUDGE_HELP)
    settings = parser.add_mutually_exclusive_group()
    settings.add_argument("--preset", default="safecode", metavar="NAME", help=f"{PRESET_NAMES} (%(default)s)")
    settings.add_argument("--config", metavar="FILE", help="settings as JSON, as SafeCoDeConfig.to_json gives them")
    parser.add_argument("--device", help="for instance cpu or cuda:0 (a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (float32 on a CPU, as saved on a GPU)",
    )
    _add_json(parser)


def _add_chat(commands: Any) -> None:
    parser = _command(
        commands,
        "chat",
        ".chat:run_chat",
        "answer one question about one image, steered",
        'chat --model llava-hf/llava-1.5-7b-hf --image kitchen.jpg --prompt "How do I clean this?" --compare\n'
        'chat --model hazard-world --image scene.png --prompt "How do I light this?" --judge unsafe --stream',
    )
    _add_request(parser)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--compare", action="store_true", help="show the plain answer too")
    shown.add_argument("--stream", action="store_true", help="show the answer while it is written")
    parser.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest answer (as SafeCoDe.chat: 256)")
    parser.add_argument(
        "--temperature", type=_non_negative, default=0.0, help="0 is greedy; above, tokens are drawn (0)"
    )
    parser.add_argument("--seed", type=_seed, help="of the noise and the draws (a new one, which --json tells)")


def _add_info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        ".info:run_info",
        "tell versions, back ends with reasons, supported models, and the memory a model needs",
        "info\ninfo --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --batch 8 --tokens 2048",
    )
    parser.add_argument("--model", metavar="PATH_OR_ID", help="tell the memory that this model needs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--batch", type=_positive, default=1, help="requests at a time (%(default)s)")
    parser.add_argument("--tokens", type=_positive, default=2048, help="of prompt, image and answer (%(default)s)")
    _add_json(parser)


def _add_world(commands: Any) -> None:
    world = commands.add_parser("world", help="train or evaluate the Hazard World model", formatter_class=_Help)
    actions = world.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    train = _command(
        actions,
        "train",
        ".world:run_train",
        "train a Hazard World model from a seed",
        "world train --seed 0 --out out/world",
    )
    train.add_argument("--seed", type=_seed, default=0, help="(%(default)s)")
    train.add_argument("--out", default="out/world", metavar="FOLDER", help="where the model goes (%(default)s)")
    train.add_argument(
        "--tune", action="store_true", help="then choose sigma, contrast and lambda on validation scenes"
    )
    evaluate = _command(
        actions,
        "eval",
        ".world:run_eval",
        "evaluate all arms on fresh scenes",
        "world eval --split-seed 7 --n 480 --json results.json\nworld eval --model out/world --controls",
    )
    evaluate.add_argument(
        "--model", metavar="FOLDER", help="a folder written by world train (the model in the package)"
    )
    evaluate.add_argument("--split-seed", type=_seed, default=0, help="which fresh test scenes to draw (%(default)s)")
    evaluate.add_argument("--n", type=_scenes, default=480, help="scenes per arm (%(default)s)")
    evaluate.add_argument("--controls", action="store_true", help="run the arms that are broken on purpose too")
    _add_json(evaluate)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _scenes(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is not at least 2: a safe and an unsafe scene")
    return value


def _non_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 2^63)")
    return value
