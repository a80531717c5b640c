"""The parts that a model folder holds: tokenizer, image processor, chat template, configuration; and the responses.

A LLaVA: CLIP's vision tower and Llama's decoder, a few million parameters. transformers reads it without torchvision,
and so does vLLM.
"""

from __future__ import annotations

import json
import re
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from l2l_core.mllm.prompt import prompt_text
from l2l_core.mllm.simulated import describe_sentence
from l2l_core.refshapes import language, solver
from vlm.scenes import GRID, IMAGE_SIZE_PX, PATCH_PX

PROMPT: Final = "box-2"
COORD_SPACE: Final = "percent"
"""The one prompt that the model was taught."""

WIDTH, LAYERS, HEAD_WIDTH = 192, 6, 32
MLP_WIDTH = 512
CONTEXT_TOKENS = 4096  # `priors.engine.context_tokens`; a question with its response takes some 200
IMAGE_MEAN, IMAGE_STD = 0.5, 0.25  # of all three colors
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<answer>"]
PAD, BOS, EOS, IMAGE, ANSWER = range(len(SPECIAL))
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<s><image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)

# The response's JSON in as few tokens as can be: what stands between its values is one token each, as are numbers with
# the comma behind them.
JOINTS = (
    '{"found":true,"target":"',
    '","attributes":[',
    '],"relation":"',
    '","anchor":"',
    '","boxes":[[',
    ']],"point":[',
    '],"confidence":',
)
PIECES = "|".join(re.escape(joint) for joint in JOINTS) + r'|"[a-z]+"| ?[a-zA-Z]+|\d\.\d\}|\d+,|\d+|,|\s|[^\sa-zA-Z\d]'
_ANCHOR = re.compile(r"(.*?\b(?:of|above|below|under|beneath|to|beside)) the (?!left|right|top|bottom)(.*)")
NUMBERS = range(101)
CONFIDENCES = range(11)  # tenths


def question_text(sentence: str) -> str:
    """What stands behind the image."""
    return prompt_text(PROMPT, sentence, COORD_SPACE)


def fixed_question() -> str:
    """The part of the question before the sentence, the same for all: one token."""
    return question_text("\0").partition("\0")[0]


def response_text(sentence: str, xyxy: tuple[int, int, int, int], confidence: int) -> str:
    """The JSON for a sentence, its box in percent and a confidence in tenths."""
    target, attributes, relation = describe_sentence(sentence)
    related = _ANCHOR.fullmatch(relation)
    link, anchor = related.groups() if related else (relation, "")
    x1, y1, x2, y2 = xyxy
    response = {
        "found": True,
        "target": target,
        "attributes": attributes,
        "relation": link,
        "anchor": anchor,
        "boxes": [[x1, y1, x2, y2]],
        "point": [(x1 + x2) // 2, (y1 + y2) // 2],
        "confidence": confidence / 10,
    }
    return json.dumps(response, separators=(",", ":"))


def confidence_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The token of each of CONFIDENCES, with the brace behind it."""
    return [tokenizer.encode(_confidence(tenth))[0] for tenth in CONFIDENCES]


def _confidence(tenth: int) -> str:
    return f"{tenth / 10}}}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of RefShapes and the response's joints are tokens, anything else falls apart into bytes."""
    words = sorted(_words())
    pieces = [
        *JOINTS,
        *(f"{lead}{word}" for word in words for lead in ("", " ")),
        *(f'"{word}"' for word in words),
        *(f"{number}{end}" for number in NUMBERS for end in ("", ",")),
        *(_confidence(tenth) for tenth in CONFIDENCES),
    ]
    bytelike = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoded = [bytelike.pre_tokenize_str(piece)[0][0] for piece in pieces]
    tokens = dict.fromkeys([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *encoded])
    # No merges: with ignore_merges a piece of the vocabulary is taken whole, others byte by byte.
    model = models.BPE(vocab={token: row for row, token in enumerate(tokens)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), bytelike])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<answer>", fixed_question()],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_TOKENS,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Images of any shape are squeezed into the square that the tower sees; shares of the image stay what they are."""
    return LlavaProcessor(
        CLIPImageProcessorPil(
            size={"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX},
            do_center_crop=False,
            image_mean=[IMAGE_MEAN] * 3,
            image_std=[IMAGE_STD] * 3,
        ),
        tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,  # the class token, which "default" drops
        chat_template=TEMPLATE,
    )


def make_config(vocabulary: int) -> LlavaConfig:
    """About five million parameters."""
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": WIDTH // HEAD_WIDTH,
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            **shape, image_size=IMAGE_SIZE_PX, patch_size=PATCH_PX, projection_dim=WIDTH, hidden_act="gelu"
        ),
        text_config=LlamaConfig(
            **shape,
            vocab_size=vocabulary,
            num_key_value_heads=WIDTH // HEAD_WIDTH,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        image_token_index=IMAGE,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def _words() -> set[str]:
    """Every word that RefShapes says, and those that responses are made of."""
    tables = (
        solver.SHAPE_WORDS,
        solver.COLOR_WORDS,
        solver.SIZE_WORDS,
        solver.TEXTURE_WORDS,
        solver.TEXTURE_NOUNS,
        solver.RANK_WORDS,
        solver.SIDE_WORDS,
        solver.EXTREME_WORDS,
        solver.GROWTH_WORDS,
        solver.RELATIONS,
    )
    phrases = [phrase for table in tables for synonyms in table.values() for phrase in synonyms]
    phrases += [*solver.ANY_WORDS, *solver.OPENERS, *solver.FILLERS]
    phrases += ["the a an that is not neither nor and with without from of to in on at", "upper lower corner side"]
    phrases += ["middle center", *language.STYLES]
    return {word for phrase in phrases for word in phrase.split()}
