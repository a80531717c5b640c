"""A Qwen2.5-VL of random weights, saved as any model of the hub is. Its processor needs torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from l2l_core.mllm.prompt import prompt_text

ENDS, STARTS, STOPS, IMAGE_STARTS, IMAGE_STOPS, IMAGE, VIDEO = SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url', 'image_pil') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 640


def save_tiny_qwen(folder: Path, seed: int = 0) -> Path:
    """Writes model, tokenizer, processor and chat template into a folder."""
    tokenizer = _tokenizer()
    id_of = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,  # of 32 numbers each, the least that vLLM's attention takes
            "num_key_value_heads": 1,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
            "initializer_range": 0.3,  # large enough that image and sentence change what is written
            "bos_token_id": id_of[ENDS],
            "eos_token_id": id_of[STOPS],
            "pad_token_id": id_of[ENDS],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.3,
        },
        image_token_id=id_of[IMAGE],
        video_token_id=id_of[VIDEO],
        vision_start_token_id=id_of[IMAGE_STARTS],
        vision_end_token_id=id_of[IMAGE_STOPS],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = id_of[STOPS]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Letters and words of our own prompt and of responses to it, so that a question is some 200 tokens long."""
    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\W"), "isolated")
    letters.decoder = decoders.Fuse()
    response = {"found": True, "target": "cup", "attributes": ["red"], "relation": "left of", "anchor": "the box"}
    response |= {"boxes": [[10, 20, 30, 40]], "point": [20, 30], "confidence": 0.5}
    texts = [prompt_text("box-2", "the red cup on the left", "resized_pixel"), json.dumps(response)] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=[chr(code) for code in range(32, 127)],
        show_progress=False,
    )
    letters.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=STOPS, pad_token=ENDS)
