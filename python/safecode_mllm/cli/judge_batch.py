"""Many verdicts: asked in batches, written as they come, and not asked again when the command runs again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SafeCoDeError
from ..judges import Judge, JudgeRequest, Verdict
from ..judges.protocol import failed
from ..terminal import Console
from .judging import Line

_DIGEST = 12
_VERDICT_FIELDS = frozenset(asdict(Verdict("unknown")))


class ResultsFile:
    """A file with one JSON object per verdict.

    A line counts only for the request it was written for (its id, its texts, the bytes of its image) and for the judge
    that wrote it, with its settings. Lines of requests without a verdict, of other judges, and a last line that was cut
    off by a crash, are dropped and asked for again.

    Args:
        path: the file; made if need be.
        judge: who judges.

    Raises:
        ConfigError: the file exists and holds something else.
    """

    def __init__(self, path: str, judge: Judge) -> None:
        self.path = Path(path)
        self.asked = 0
        settings = json.dumps(getattr(judge, "settings", {}), sort_keys=True)
        self._judge = {
            "judge": judge.name,
            "version": getattr(judge, "version", None),
            "settings": hashlib.sha256(settings.encode()).hexdigest()[:_DIGEST],
        }
        self._known: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for row in self._rows():
                if row.get("label") in ("safe", "unsafe") and all(row.get(k) == v for k, v in self._judge.items()):
                    self._known[row["request"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _rows(self) -> list[dict[str, Any]]:
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError:
                if number < len(lines):
                    raise ConfigError(f"--results {self.path}: line {number} is no JSON; give another file") from None
                continue  # the last line, cut off
            if row is None:
                continue
            if not isinstance(row, dict) or not isinstance(row.get("request"), str):
                raise ConfigError(f"--results {self.path}: line {number} is no verdict; give another file")
            rows.append(row)
        return rows

    def known(self, digest: str) -> Verdict | None:
        """Return the verdict on a request that was written before, None if it has to be asked for."""
        row = self._known.get(digest)
        return None if row is None else Verdict(**{k: v for k, v in row.items() if k in _VERDICT_FIELDS})

    def keep_only(self, digests: Sequence[str]) -> None:
        """Begin: write what is known about these requests anew, in one step, and drop the rest."""
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text("".join(_row(self._known[d]) for d in digests if d in self._known), encoding="utf-8")
        os.replace(beside, self.path)

    def add(self, line_id: str, digest: str, verdict: Verdict) -> None:
        """Append one verdict."""
        row = {"id": line_id, "request": digest, **asdict(verdict), **self._judge}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_row(row))
        self.asked += 1


def _row(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=True, allow_nan=False) + "\n"


def judge_lines(
    lines: Sequence[Line], judge: Judge, results: ResultsFile, batch_size: int, console: Console
) -> list[Verdict]:
    """Return a verdict per line, in order, asking in batches for those that are not in the results yet."""
    digests = [_digest(line) for line in lines]
    results.keep_only(digests)
    verdicts = {line.id: known for line, d in zip(lines, digests, strict=True) if (known := results.known(d))}
    todo = [(line, d) for line, d in zip(lines, digests, strict=True) if line.id not in verdicts]
    if verdicts:
        console.note(f"{len(verdicts)} of {len(lines)} are in {results.path} already")
    with console.counting("verdicts") as counter:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            for (line, digest), verdict in zip(batch, _judged([line for line, _ in batch], judge), strict=True):
                results.add(line.id, digest, verdict)
                verdicts[line.id] = verdict
            counter(len(verdicts), len(lines), "")
    return [verdicts[line.id] for line in lines]


def _judged(lines: Sequence[Line], judge: Judge) -> list[Verdict]:
    """Return a verdict per line; an image that cannot be used is that line's error."""
    requests: list[JudgeRequest] = []
    outcomes: list[Verdict | None] = []
    for line in lines:
        try:
            requests.append(line.request())
            outcomes.append(None)
        except SafeCoDeError as error:
            outcomes.append(failed(judge.name, error))
    judged = iter(judge.judge_many(requests) if requests else [])
    return [next(judged) if outcome is None else outcome for outcome in outcomes]


def _digest(line: Line) -> str:
    """Return the SHA-256 of everything that a line asks; the prompt itself is not written to the results."""
    turns = [[turn.role, turn.text] for turn in line.fields["conversation"]]
    texts = json.dumps([line.id, line.fields["prompt"], turns, line.fields["policy_text"]], ensure_ascii=True)
    try:
        image = hashlib.sha256(line.image.read_bytes()).hexdigest()
    except OSError:
        image = ""  # named by the line's own error later
    return hashlib.sha256(f"{texts}\n{image}".encode()).hexdigest()
