"""Where the verdicts of one generation come from: given with the requests, or a judge that is asked meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.errors import JudgeError
from safecode_mllm.judges.asking import ask_beside, ask_judge, settle
from safecode_mllm.judges.protocol import Judge, JudgeRequest, Verdict, is_remote
from safecode_mllm.judges.self_judge import SelfJudge

Pending = Callable[[], Sequence[Verdict | JudgeError]]


def make_verdict_source(
    given: Sequence[Verdict | None],
    asked: Sequence[int],
    requests: Sequence[JudgeRequest],
    judge: Judge | None,
    config: SafeCoDeConfig,
    model: Any,
    pending: Pending | None = None,
) -> Callable[[Branches], list[Verdict | Exception | None]]:
    """Return what a steered generation calls after the prefill: verdicts with the policies applied, or errors.

    Args:
        given: one entry per row, None where no verdict is given; a row that is neither given nor asked has no bias.
        asked: the rows that the judge is asked about.
        requests: one per row of `asked`.
        judge: who is asked; a judge that works elsewhere is asked now, in a thread of its own.
        config: reads on_judge_error and on_unknown.
        model: the model that is steered; a self-judge of it reads through the prefilled branches.
        pending: waits for the verdicts on `requests` if a judge is being asked about them already.
    """
    if pending is None and judge is not None and is_remote(judge):
        pending = ask_beside(judge, requests, config)

    def source(branches: Branches) -> list[Verdict | Exception | None]:
        answers: list[Verdict | Exception | None] = [
            None if verdict is None else settle(verdict, config, name=verdict.judge) for verdict in given
        ]
        if judge is None:
            return answers
        verdicts: Sequence[Verdict | JudgeError]
        if pending is not None:
            verdicts = pending()
        else:
            judge_many = judge.judge_many
            if isinstance(judge, SelfJudge) and judge.judges_with(model):
                judge_many = partial(judge.read, branches, asked)
            verdicts = ask_judge(judge_many, requests, config, name=judge.name)
        for row, answer in zip(asked, verdicts, strict=True):
            answers[row] = answer
        return answers

    return source
