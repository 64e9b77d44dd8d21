"""The ways to answer a request whose time is compared: stock, by hand, and ours.

Every arm starts from pictures and text and ends with token ids, so processors, noise and judges are part of its time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generate_models import Geometry
from torch import Tensor
from transformers import DynamicCache

from safecode_mllm import SafeCoDe, SafeCoDeConfig, compat
from safecode_mllm.judges.question import questions
from safecode_mllm.noise import noised_pixels
from safecode_mllm.prompts import PromptBuilder, collate

Arm = Callable[[], Tensor]

# Sampling as people set it: transformers' top_k of 50 is on by default.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
# Random weights put no mass on two letters; what the verdict is worth is not what is measured.
CONFIG = SafeCoDeConfig(on_unknown="treat_as_unsafe")
WINDOW = 5
SEED = 1


class Arms:
    """Makes the arms of one geometry.

    Args:
        geometry: model, processor, request.
        batch: requests per call.
        new_tokens: tokens that every arm writes.
    """

    def __init__(self, geometry: Geometry, batch: int, new_tokens: int):
        self.model, self.processor = geometry.model, geometry.processor
        self.builder = PromptBuilder(geometry.processor)
        self.prompt, self.batch, self.new_tokens = geometry.prompt, batch, new_tokens
        self.pictures = [geometry.picture(seed) for seed in range(batch)]
        self.safecode = SafeCoDe(geometry.model, geometry.processor, judge="unsafe", config=CONFIG)
        plain = SafeCoDeConfig(contrast_weight=0, plausibility_beta=0, bias_form="none")
        self.unsteered = SafeCoDe(geometry.model, geometry.processor, judge=None, config=plain)

    def inputs(self) -> dict[str, Tensor]:
        """Return the processor's output for the batch, on the model's device."""
        rows = [self.builder.build(picture, self.prompt) for picture in self.pictures]
        return self._placed(collate(rows, self.builder.pad_token_id))

    def stock(self, **arguments: Any) -> Tensor:
        """`model.generate` without steering."""
        inputs = self.inputs()
        output = self.model.generate(**inputs, max_new_tokens=self.new_tokens, **{"do_sample": False, **arguments})
        return output[:, inputs["input_ids"].shape[1] :]

    def weight0(self, **arguments: Any) -> Tensor:
        """Our loop with nothing to steer."""
        return self._ours(self.unsteered, None, arguments)

    def steered(self, **arguments: Any) -> Tensor:
        """Our loop, contrast and a given verdict."""
        return self._ours(self.safecode, "unsafe", arguments)

    def steered_judge(self, **arguments: Any) -> Tensor:
        """The same with the model as its own judge."""
        return self._ours(self.safecode, "self", arguments)

    def _ours(self, pipeline: SafeCoDe, judge: str | None, arguments: dict[str, Any]) -> Tensor:
        requests = [{"image": picture, "prompt": self.prompt, "seed": SEED} for picture in self.pictures]
        arguments = {"do_sample": False, "max_new_tokens": self.new_tokens, **arguments}
        results = pipeline.chat_batch(requests, judge=judge, batch_size=self.batch, record=False, **arguments)
        for result in results:
            if result.error is not None:
                raise result.error
        return torch.tensor([result.token_ids for result in results])

    @torch.no_grad()
    def floor(self, judge: bool = False) -> Tensor:
        """Plain forward passes of the same shapes: one prefill of both branches, guided steps, the clean rest."""
        clean, noised = self._both()
        both = {key: torch.cat([clean[key], noised[key]]) for key in clean}
        cache = DynamicCache()
        logits = self.model(**both, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if judge:
            self._floor_judge(cache, clean)
        mask, tokens = both["attention_mask"], []
        for step in range(self.new_tokens):
            token = logits[: self.batch].argmax(-1)
            tokens.append(token)
            if step == self.new_tokens - 1:
                break
            if step == WINDOW - 1:
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[: self.batch], layer.values[: self.batch]
                mask = mask[: self.batch]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            ids = token.repeat(len(mask) // self.batch)[:, None]
            logits = self._forward(ids, mask, cache)
        return torch.stack(tokens, 1)

    def _floor_judge(self, cache: Any, clean: dict[str, Tensor]) -> None:
        """Plain forward passes for the verdict: one per label order over its whole question, behind the cached prompt.

        Nothing is shared between the orders, so that ours can take less time than this.
        """
        for question in questions():
            suffix = self.builder.judge_suffix(self.prompt, question).ids
            fork = DynamicCache()
            for index, layer in enumerate(cache.layers):
                fork.update(layer.keys[: self.batch], layer.values[: self.batch], index)
            ids = torch.tensor([suffix] * self.batch, device=clean["input_ids"].device)
            mask = torch.cat([clean["attention_mask"], torch.ones_like(ids)], 1)
            self._forward(ids, mask, fork)

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    @torch.no_grad()
    def naive(self) -> Tensor:
        """Two branches one after the other, each with a cache of its own, and the step as a chain of PyTorch calls."""
        branches = [(inputs, DynamicCache(), inputs["attention_mask"]) for inputs in self._both()]
        logits = [
            self.model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1].float()
            for inputs, cache, _ in branches
        ]
        masks, tokens = [mask for *_, mask in branches], []
        for step in range(self.new_tokens):
            z = logits[0]
            if step < WINDOW:
                scores = (1 + CONFIG.contrast_weight) * z - CONFIG.contrast_weight * logits[1]
                cut = z.max(-1, keepdim=True).values + torch.log(torch.tensor(CONFIG.plausibility_beta))
                z = scores.masked_fill(z < cut, -torch.inf)
            token = z.argmax(-1)
            tokens.append(token)
            for index, (_, cache, _) in enumerate(branches if step < WINDOW - 1 else branches[:1]):
                masks[index] = torch.cat([masks[index], masks[index].new_ones(self.batch, 1)], 1)
                logits[index] = self._forward(token[:, None], masks[index], cache).float()
        return torch.stack(tokens, 1)

    def _both(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        clean = self.inputs()
        noise = noised_pixels(clean["pixel_values"].cpu(), self.builder.image_processor, CONFIG, SEED, index=0)
        return clean, self._placed(dict(clean, pixel_values=noise))

    def _placed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        device, dtype = self.model.device, self.model.dtype
        return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}


class PublishedWork:
    """One request as the published code answers it, and as our drop-in for it does, which must write the same ids.

    Args:
        arms: model, processor, request.
        checkout: folder of a checkout of the published code.
        verdict: "safe" or "unsafe".
        free_tokens: how many tokens are written behind the guided ones.
    """

    def __init__(self, arms: Arms, checkout: str, verdict: str, free_tokens: int):
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the repairs that the published code needs
        import published_checkout

        self._checkout, self._utils = published_checkout, published_checkout.load_checkout(checkout)
        self._arms, self._free_tokens = arms, free_tokens
        # Both read the picture every time; the folder lives as long as this object.
        self._folder = tempfile.TemporaryDirectory()
        arms.pictures[0].save(Path(self._folder.name) / "picture.png")
        self._settings: dict[str, Any] = dict(
            real_img_path=str(Path(self._folder.name) / "picture.png"), conversation=arms.prompt, verdict=verdict,
            refusal_prefixes=["I cannot", "I'm sorry", "Sorry"], model_type="llava", alpha=0.3, max_steps=WINDOW,
            top_k=20, lambda_supp=1.0, lambda_boost=1.0,
        )  # fmt: skip
        self._written: list[int] | None = None

    @property
    def new_tokens(self) -> int:
        """How many tokens stand behind the prompt; the published code chooses how many of them are guided."""
        if self._written is None:
            self.published()
        return len(self._written or []) - self._arms.inputs()["input_ids"].shape[1]

    def published(self) -> Tensor:
        """The published implementation, with the repairs that it needs."""
        run = partial(self._checkout.run_published, self._utils, self._arms.model, self._arms.processor)
        self._written = self._answer(run, self._utils)
        return torch.tensor([self._written])

    def dropin(self) -> Tensor:
        """Our drop-in; raises unless it writes what the published implementation wrote."""
        tokenizer = self._arms.processor.tokenizer
        function = compat.contrastive_decode_multistep_with_modulation
        ids = self._answer(partial(function, self._arms.model, self._arms.processor, tokenizer), compat)
        if ids != self._written:
            raise AssertionError(f"the drop-in wrote {ids}, the published code {self._written}")
        return torch.tensor([ids])

    def _answer(self, function: Callable[..., Any], module: Any) -> list[int]:
        """Run one of them from the same seed, its answer cut at so many tokens behind the guided ones."""
        model = self._arms.model
        stock_generate = model.generate

        def shortened(*args: Any, **arguments: Any) -> Any:
            arguments.pop("max_length", None)
            return stock_generate(*args, **{**arguments, "max_new_tokens": self._free_tokens})

        torch.manual_seed(SEED)
        noised = module.apply_gaussian_noise(self._arms.pictures[0])
        model.generate = shortened
        try:
            return function(neutral_img=noised, **self._settings)[1]
        finally:
            vars(model).pop("generate", None)  # the repairs take it away themselves when they end
