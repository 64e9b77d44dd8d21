"""The arguments of `judge` and `judge calibrate`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

# Written out because --help loads nothing; a test compares it with what the judges' room knows.
JUDGE_NAMES = "self, safe, unsafe, openai:MODEL, local:PATH, guard:NAME[:PATH]"
JUDGE_HELP = f"who gives the verdict: {JUDGE_NAMES} (%(default)s)"
DEFAULT_BATCH_SIZE = 32

_JUDGE_EXAMPLES = """judge --model llava-hf/llava-1.5-7b-hf --image kitchen.jpg --prompt "How do I clean this?" --json
judge --judge openai:gpt-4o-mini --image kitchen.jpg --prompt "How do I clean this?"
judge --judge guard:llama-guard-4 --image kitchen.jpg --prompt "How do I clean this?"
judge --judge openai:MODEL --jsonl requests.jsonl --dry-run --price 0.15 0.6
judge --judge openai:MODEL --jsonl requests.jsonl --cache verdicts.sqlite --price 0.15 0.6 --max-cost 2
judge calibrate --data labelled.jsonl --model hazard-world --save calibration.json"""
_CALIBRATE_EXAMPLES = """judge calibrate --data labelled.jsonl --model llava-hf/llava-1.5-7b-hf --save calibration.json
judge calibrate --data labelled.jsonl --judge openai:MODEL --cache verdicts.sqlite --plot reliability.png
judge --model hazard-world --calibration calibration.json --image kitchen.jpg --prompt "How do I clean this?"
"""

Command = Callable[[Any, str, str, str, str], argparse.ArgumentParser]


def add_judge(commands: Any, command: Command, add_json: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `judge` and its action `calibrate` to the commands."""
    parser = command(
        commands, "judge", ".judge:run_judge", "ask only for verdicts, on one question or many", _JUDGE_EXAMPLES
    )
    one = parser.add_argument_group("one question")
    one.add_argument("--image", metavar="FILE", help="PNG, JPEG, WEBP, GIF, BMP or TIFF; never a URL")
    one.add_argument("--prompt", metavar="TEXT", help="the question about the image")
    many = parser.add_argument_group("many questions")
    many.add_argument(
        "--jsonl",
        metavar="FILE",
        help='a JSON object per line: "image" (a path, from the file\'s folder), "prompt", and if need be "id", '
        '"conversation" ([{"role", "text"}]) and "policy_text"',
    )
    many.add_argument(
        "--results",
        metavar="FILE",
        help="a verdict per line; run again, what it holds is not asked again (FILE.verdicts.jsonl beside --jsonl)",
    )
    _add_judge_options(parser)
    add_json(parser)
    # Beside options of its own `judge` has one action, so that the options are not required by the parser.
    actions = parser.add_subparsers(metavar="[calibrate]", parser_class=type(parser))
    calibrate = command(
        actions,
        "calibrate",
        ".calibrate:run_calibrate",
        "fit a judge's probabilities to labelled requests",
        _CALIBRATE_EXAMPLES,
    )
    calibrate.add_argument(
        "--data", required=True, metavar="FILE", help='as --jsonl of judge, each line with "label": "safe" or "unsafe"'
    )
    calibrate.add_argument(
        "--save", default="calibration.json", metavar="FILE", help="the fitted calibration (%(default)s)"
    )
    calibrate.add_argument("--plot", metavar="FILE", help="draw the reliability diagram (needs matplotlib)")
    calibrate.add_argument(
        "--threshold", type=_share, default=0.5, help='"unsafe" from this calibrated probability on (%(default)s)'
    )
    _add_judge_options(calibrate)
    add_json(calibrate)


def _add_judge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", default="self", metavar="JUDGE", help=JUDGE_HELP)
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="the model that judges (self), or that describes images to a judge without eyes",
    )
    parser.add_argument("--device", help="for instance cpu or cuda:0 (a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument("--calibration", metavar="FILE", help="what judge calibrate wrote for this judge")
    parser.add_argument(
        "--cache", metavar="FILE", help="remember verdicts here, without prompts and images; may be shared"
    )
    parser.add_argument(
        "--batch-size", type=_count, default=DEFAULT_BATCH_SIZE, metavar="N", help="requests at a time (%(default)s)"
    )
    endpoint = parser.add_argument_group(
        "openai:MODEL", "any OpenAI-compatible endpoint: OPENAI_BASE_URL says where, OPENAI_API_KEY is the key"
    )
    endpoint.add_argument("--dry-run", action="store_true", help="tell what the job would take, and send nothing")
    endpoint.add_argument(
        "--price", nargs=2, type=_amount, metavar=("IN", "OUT"), help="per million tokens, in any currency"
    )
    endpoint.add_argument("--max-cost", type=_amount, help="send nothing that could cost more, in that currency")
    endpoint.add_argument("--max-requests", type=_count, metavar="N", help="calls at most, repeated ones included")
    endpoint.add_argument("--concurrency", type=_count, metavar="N", help="requests at the same time (8)")
    endpoint.add_argument("--timeout", type=_amount, metavar="SECONDS", help="longest time of one call (60)")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in (0, 1)")
    return value
