"""The small LLaVA of Hazard World: transformers' own classes, a byte-level BPE tokenizer, a CLIP image processor."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .language import CHAT_TEMPLATE, IMAGE_TOKEN, corpus
from .paths import WEIGHTS
from .render import SIZE

PATCH = 8
VISION_WIDTH = 96
IMAGE_TOKENS = (SIZE // PATCH) ** 2
# Without this, transformers 4.57 makes token_type_ids, which a LLaVA does not take.
MODEL_INPUTS = ("input_ids", "attention_mask")
_PAD, _BOS, _EOS, _UNK = "<pad>", "<s>", "</s>", "<unk>"
_VOCAB_SIZE = 704
_MAX_POSITIONS = 512
_SPECIALS = (_PAD, _BOS, _EOS, _UNK, IMAGE_TOKEN)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on every sentence of the world; the result is always the same."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=list(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, backend.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNK,
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        model_max_length=_MAX_POSITIONS,
        model_input_names=list(MODEL_INPUTS),
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Return the processor: 48-pixel images scaled to [-1, 1], 36 image tokens, LLaVA's chat format."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """Return the untrained model (about a million fp32 parameters) with weights drawn from a seed.

    Args:
        tokenizer: gives the vocabulary size and the special ids.
        seed: seed of the weights; the global generators are left as they were.
    """
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=VISION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_MAX_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=IMAGE_TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    return model


def load_world(
    path: str | Path | None = None, *, dtype: torch.dtype | str = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return the trained model (CPU, eval mode) and its processor.

    Args:
        path: folder written by `train`; None is the model that ships with the package.
        dtype: of the weights, which are stored in fp32.

    Raises:
        FileNotFoundError: the folder holds no model.
    """
    folder = Path(path) if path is not None else WEIGHTS
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"path={str(folder)!r} holds no Hazard World model: run safecode-mllm world train")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor
