"""A judge behind an OpenAI-compatible endpoint: prompt, calls, replies, money."""

from __future__ import annotations

from safecode_mllm.judges.endpoint.budget import Budget, Estimate, Price, Usage
from safecode_mllm.judges.endpoint.judge import EndpointJudge

__all__ = ["Budget", "EndpointJudge", "Estimate", "Price", "Usage"]
