"""`judge`: the verdict on one question about one image, or on a file of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ..errors import ConfigError, JudgeError
from ..judges import Judge, JudgeRequest, Verdict
from ..judges.protocol import count_outcomes
from ..terminal import Console, one_line
from .codes import JUDGE_FAILED
from .judging import check_judge, load_judge, read_lines
from .outputs import check_file
from .parser import STDOUT
from .runtime import write_json
from .verdict_text import verdict_text


def run_judge(args: argparse.Namespace, console: Console) -> int | None:
    """Print one verdict, or write many; a verdict that is missing or unknown counts as a failure of the judge."""
    check_judge(args)
    if args.jsonl is not None:
        return _many(args, console)
    if args.results is not None:
        raise ConfigError("--results belongs to --jsonl; one verdict goes to stdout, or with --json to a file")
    request = _request(args)
    judge = load_judge(args, console)
    if args.dry_run:
        _dry_run(judge, [request], args, console)
        return None
    (verdict,) = judge.judge_many([request])
    if verdict.error is not None:
        raise JudgeError(verdict.error)
    if args.json != STDOUT:
        console.result(_report(verdict))
    if args.json:
        write_json(args.json, asdict(verdict), console)
    return JUDGE_FAILED if verdict.label == "unknown" else None


def _request(args: argparse.Namespace) -> JudgeRequest:
    """Return image and prompt, checked before anybody waits for a model to load."""
    from ..images import load_image
    from ..prompt_text import check_prompt

    if args.image is None or args.prompt is None:
        raise ConfigError("--image and --prompt are needed, or --jsonl with a file of them")
    check_prompt(args.prompt)
    return JudgeRequest(load_image(args.image), args.prompt)


def _report(verdict: Verdict) -> str:
    lines = [verdict_text(verdict)]
    for name in ("category", "reason", "caption"):
        if getattr(verdict, name):
            lines.append(f"{name}: {one_line(getattr(verdict, name))}")
    if verdict.label == "unknown" and verdict.raw:
        lines.append(f"reply: {one_line(verdict.raw)}")
    if verdict.latency_s is not None:
        remembered = ", from the cache" if verdict.cached else ""
        lines.append(f"judge: {verdict.judge}, {verdict.latency_s:.2f} s{remembered}")
    return "\n".join(lines)


def _many(args: argparse.Namespace, console: Console) -> int | None:
    from .judge_batch import ResultsFile, judge_lines

    if args.image is not None or args.prompt is not None:
        raise ConfigError("--jsonl brings images and prompts of its own: leave --image and --prompt out")
    lines = read_lines(args.jsonl, "--jsonl")
    target = args.results or f"{args.jsonl}.verdicts.jsonl"
    check_file("--results", target)
    judge = load_judge(args, console)
    if args.dry_run:
        _dry_run(judge, (line.request() for line in lines), args, console)
        return None
    results = ResultsFile(target, judge)
    outcomes = judge_lines(lines, judge, results, args.batch_size, console)
    counts = dict(count_outcomes(outcomes))
    used = _usage(judge)
    summary: dict[str, Any] = {"results": str(target), "outcomes": counts, "asked": results.asked, "usage": used}
    if used is not None:
        cost = f", cost {used['cost']:.4g}" if args.price else ""
        console.note(
            f"{used['requests']} calls ({used['retries']} repeated), "
            f"{used['input_tokens']} tokens in, {used['output_tokens']} out{cost}"
        )
    if args.json != STDOUT:
        console.result(
            f"{', '.join(f'{count} {name}' for name, count in counts.items())}; {results.asked} asked now: {target}"
        )
    if args.json:
        write_json(args.json, summary, console)
    missing = counts["unknown"] + counts["error"]
    if missing:
        console.problem(f"{missing} of {len(lines)} requests have no verdict: the same command asks for them again")
    return JUDGE_FAILED if missing else None


def _behind_cache(judge: Judge) -> Any:
    return getattr(judge, "judge", judge)


def _usage(judge: Judge) -> dict[str, Any] | None:
    """Return what an endpoint's calls took; None for a judge without calls."""
    usage = getattr(_behind_cache(judge), "usage", None)
    return None if usage is None else asdict(usage)


def _dry_run(judge: Judge, requests: Iterable[JudgeRequest], args: argparse.Namespace, console: Console) -> None:
    estimate = _behind_cache(judge).estimate(requests)
    cost = "" if estimate.cost is None else f", at most {estimate.cost:.4g} in the currency of --price"
    if args.json != STDOUT:
        console.result(
            f"{estimate.requests} requests, about {estimate.input_tokens} tokens in, at most "
            f"{estimate.output_tokens} out{cost}; tokens are estimated and nothing was sent"
        )
    if args.json:
        write_json(args.json, asdict(estimate), console)
