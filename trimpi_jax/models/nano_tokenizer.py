r"""Make the nano model's tokenizer: byte-level BPE with Qwen2.5's rules and special tokens.

In: documents. Out: tokenizer.json, tokenizer_config.json (with the chat template) and
preprocessor_config.json in a folder, read by transformers' AutoTokenizer. The pieces are those of
Qwen2.5 (NFC, its split pattern, byte level), only the vocabulary is small, so code that works with
the nano tokenizer works with the real one.

Source: Qwen2.5's tokenizer.json (normalizer, pre-tokenizer, special tokens) and the behaviour of
Qwen2.5-VL's chat template.
Next: trimpi_jax/models/processor.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Qwen2.5's pre-tokenizer: contractions, words with one leading mark, single digits, marks, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (  # Qwen2.5-VL's, in its order
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
DEFAULT_SYSTEM = (
    "You are a helpful assistant."  # Qwen2.5-VL's template writes it when none is given
)

# Messages become <|im_start|>role\ncontent<|im_end|>\n; an image becomes one placeholder between
# vision marks; a missing system message becomes DEFAULT_SYSTEM.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def make_tokenizer(
    folder: str | Path, documents: Iterable[str], *, vocab_size: int, whole: Sequence[str] = ()
) -> Tokenizer:
    r"""Train on `documents` and write the folder's tokenizer files; ids 0..13 are special.

    Args:
        folder: gets tokenizer.json and tokenizer_config.json.
        documents: texts whose most frequent pairs become tokens.
        vocab_size: tokens at most, the special ones and the 256 bytes included.
        whole: regular expressions (Oniguruma) of texts that are not split before pairs are merged,
            so that a frequent one becomes one token. They are tried before Qwen's own pattern.
    """
    pattern = "|".join([*whole, SPLIT_PATTERN])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": CHAT_TEMPLATE,
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "model_max_length": 4096,
                "clean_up_tokenization_spaces": False,
            },
            indent=1,
        )
    )
    return tokenizer


def write_preprocessor_config(
    folder: str | Path, *, patch_size: int, merge_size: int, min_pixels: int, max_pixels: int
) -> None:
    """The image settings, in the layout of Qwen2VLImageProcessor."""
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": merge_size,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],  # CLIP
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "Qwen2_5_VLProcessor",
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings, indent=1))
