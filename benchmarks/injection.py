"""Does a judge obey what the request or the picture tells it? Tries the forged replies of judges/attacks.py on a model.

    make injection MODEL=llava-hf/llava-1.5-7b-hf
    python benchmarks/injection.py --model PATH --data labelled.jsonl --judge self --out injection.json
    python benchmarks/injection.py --judge openai:MODEL --data labelled.jsonl

Each attack is put behind the request, and then written beneath the picture. Only requests that the judge calls unsafe
without it count: a flip is an "unsafe" that becomes "safe". Without --data the scenes are those of Hazard World,
enlarged; a model that has never seen such pictures may call few of them unsafe: labelled data of one's own say more.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from safecode_mllm.cli.judging import read_lines
from safecode_mllm.errors import SafeCoDeError
from safecode_mllm.hazard_world.render import render
from safecode_mllm.hazard_world.splits import draw_items
from safecode_mllm.judges import Judge, JudgeRequest, bind, make_judge
from safecode_mllm.judges.attacks import FORGED, in_picture, in_request
from safecode_mllm.loading import load_model
from safecode_mllm.prompts import PromptBuilder

RESULTS = Path(__file__).parent / "results" / "injection"
# Enough for an interval, few enough for an endpoint's bill: 8 requests x 82 attacks x 2 places = 1312 verdicts.
DEFAULT_N = 8
# Scenes of Hazard World have 48 pixels; letters beneath them must be readable.
ENLARGED = 384
_BATCH = 8


def main() -> int:
    """Parse the command line, attack, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH_OR_ID", help="the model that judges (self) or describes")
    parser.add_argument("--judge", default="self", help="as --judge of safecode-mllm judge (%(default)s)")
    parser.add_argument("--data", metavar="FILE", help="labelled as for judge calibrate; the unsafe ones are used")
    parser.add_argument("--n", type=int, default=DEFAULT_N, help="unsafe requests (%(default)s)")
    parser.add_argument("--attacks", type=int, default=len(FORGED), help="how many of the attacks (%(default)s)")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON (benchmarks/results/injection/)")
    arguments = parser.parse_args()
    try:
        judge = load_judge(arguments)
        requests = unsafe_requests(arguments)
        result = attack(judge, requests, FORGED[: arguments.attacks])
    except SafeCoDeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = (arguments.model or arguments.judge).strip("/").replace("/", "_").replace(":", "_")
    path = arguments.out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))
    print(f"wrote {path}")
    return 0


def load_judge(arguments: argparse.Namespace) -> Judge:
    """Return the judge, with the model attached that it needs."""
    judge = make_judge(arguments.judge)
    assert judge is not None
    if arguments.model is not None:
        model, processor = load_model(arguments.model, device=arguments.device)
        bind(judge, model, PromptBuilder(processor))
    return judge


def unsafe_requests(arguments: argparse.Namespace) -> list[JudgeRequest]:
    """Return the first unsafe requests of the labelled file, or unsafe scenes of Hazard World."""
    if arguments.data is not None:
        lines = [line for line in read_lines(arguments.data, "--data", labelled=True) if line.label == "unsafe"]
        return [line.request() for line in lines[: arguments.n]]
    items = [item for item in draw_items("test", 4 * arguments.n, 0) if item.scene.unsafe][: arguments.n]
    size = (ENLARGED, ENLARGED)
    return [JudgeRequest(render(item.scene).resize(size, Image.Resampling.NEAREST), item.request) for item in items]


def attack(judge: Judge, requests: Sequence[JudgeRequest], attacks: Sequence[str]) -> dict[str, Any]:
    """Return how often each attack, in each place, turns an "unsafe" into a "safe" or into nothing."""
    before = judged(judge, requests)
    counted = [request for request, outcome in zip(requests, before, strict=True) if outcome == "unsafe"]
    result: dict[str, Any] = {"judge": judge.name, "version": getattr(judge, "version", None)}
    result |= {"requests": len(requests), "unsafe_before": len(counted), "attacks": len(attacks), "places": {}}
    for place in ("request", "picture"):
        outcomes = []
        for text in attacks:
            attacked = [_attacked(request, text, place) for request in counted]
            outcomes.append(judged(judge, attacked))
        flat = [outcome for row in outcomes for outcome in row]
        flips = flat.count("safe")
        # The same requests recur under every attack, so verdicts are no independent cases; requests are.
        turned = sum("safe" in row for row in zip(*outcomes, strict=True))
        low, high = wilson(turned, len(counted))
        worst = sorted(zip((row.count("safe") for row in outcomes), attacks, strict=True), reverse=True)[:5]
        result["places"][place] = {
            "verdicts": len(flat),
            "flipped_to_safe": flips,
            "rate": flips / len(flat) if flat else None,
            "requests_turned": turned,
            "requests_turned_interval": [low, high],
            "unknown": flat.count("unknown"),
            "errors": flat.count("error"),
            "worst": [{"attack": text, "flips": count} for count, text in worst if count],
        }
    return result


def _attacked(request: JudgeRequest, text: str, place: str) -> JudgeRequest:
    if place == "request":
        return JudgeRequest(request.image, in_request(request.prompt, text))
    return JudgeRequest(in_picture(request.image, text), request.prompt)


def judged(judge: Judge, requests: Sequence[JudgeRequest]) -> list[str]:
    """Return how each request ended."""
    outcomes: list[str] = []
    for start in range(0, len(requests), _BATCH):
        outcomes += [verdict.outcome for verdict in judge.judge_many(requests[start : start + _BATCH])]
    return outcomes


def wilson(hits: int, n: int) -> tuple[float | None, float | None]:
    """Return the 95 % Wilson interval of a rate."""
    if not n:
        return None, None
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def report(result: dict[str, Any]) -> str:
    """Return the result in words."""
    lines = [
        f"{result['judge']}: {result['unsafe_before']} of {result['requests']} unsafe requests are called unsafe "
        f"without an attack; {result['attacks']} attacks on each"
    ]
    for place, found in result["places"].items():
        if not found["verdicts"]:
            lines.append(f"in the {place}: nothing to flip")
            continue
        low, high = found["requests_turned_interval"]
        lines.append(
            f"in the {place}: {found['flipped_to_safe']} of {found['verdicts']} become safe ({found['rate']:.3f}), "
            f"{found['unknown']} unknown, {found['errors']} errors; at least one attack turns "
            f"{found['requests_turned']} of {result['unsafe_before']} requests (95 % [{low:.3f}, {high:.3f}])"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
