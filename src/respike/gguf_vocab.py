"""What a GGUF file's keys say about its tokenizer, as a `tokenizers.Tokenizer`.

Two kinds: ``gpt2`` is byte-level BPE, whose pre-tokenizer the file only names; ``llama`` is
SentencePiece BPE, whose merges follow from the scores.

Sources: llama.cpp ``src/llama-vocab.cpp`` (names, regexes, defaults); the families' own
``tokenizer.json`` (normalisers, decoders); transformers ``LlamaConverter`` (SentencePiece).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from respike.errors import CheckpointError, RespikeError, UnsupportedError, did_you_mean

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Values of ``tokenizer.ggml.token_type`` that matter here."""

END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")
"""Control tokens that end a chat model's turn, whether or not the file says so."""


class PreTokenizer(NamedTuple):
    """How text is cut before the merges: each regex cuts the pieces the one before left."""

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    """A piece that is a token is that token, whatever the merges would make of it."""
    add_bos: bool = False
    """Whether BOS is added when the file does not say."""


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _WORDS.replace("DIGITS", r"\p{N}")
_LLAMA3 = _WORDS.replace("DIGITS", r"\p{N}{1,3}")
_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CASED = (
    r"\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    r"\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    r"\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    r"\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    r"\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    r"\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    r"\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    r"\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    r"\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    r"\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    r"\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    r"\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    r"\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    _CASED,
    r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    r"\p{N}",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_plain = PreTokenizer((_GPT2,))
_digits = PreTokenizer((r"\p{N}", _GPT2))
_qwen2 = PreTokenizer((_QWEN2,), nfc=True)
_llama3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _plain,
    "olmo": _plain,
    "phi-2": _plain,
    "smollm": _digits,
    "starcoder": _digits,
    "refact": _digits,
    "command-r": _digits,
    "codeshell": _digits,
    "minerva-7b": _digits,
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "megrez": _qwen2,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "falcon3": _llama3,
    "glm4": PreTokenizer((_LLAMA3,), ignore_merges=True),
    "chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),
}
"""``tokenizer.ggml.pre`` to its pre-tokenizer."""


class GgufVocab(NamedTuple):
    """A tokenizer read from GGUF keys, and what `tokenizers` has no place for."""

    core: Tokenizer
    tokens: list[str]
    add_bos: bool


def read_vocab(metadata: Mapping[str, Any], source: str) -> GgufVocab:
    """Build the tokenizer that ``metadata`` describes; ``source`` names it in messages.

    Raises:
        CheckpointError: A key is missing or contradicts another.
        UnsupportedError: A kind of tokenizer, or a pre-tokenizer, that is not in the tables here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        raise UnsupportedError(
            f"{source}: tokenizer.ggml.model is {str(kind)[:40]!r}; known are gpt2, llama",
            hint="use the model's Hugging Face folder instead",
        )
    tokens = _tokens(metadata, source)
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens), source)
    try:
        core, add_bos = builders[kind](metadata, tokens, types, source)
        added = [
            AddedToken(token, normalized=False, special=types[i] != USER_DEFINED)
            for i, token in enumerate(tokens)
            if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
        core.add_tokens([token for token in added if not token.special])
        core.add_special_tokens([token for token in added if token.special])
        add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
        if add_bos and (bos := metadata.get("tokenizer.ggml.bos_token_id")) is not None:
            start = tokens[bos]
            core.post_processor = TemplateProcessing([start, "$A"], None, [(start, bos)])
    except RespikeError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{source}: tokenizer: {' '.join(str(error).split())}") from None
    return GgufVocab(core, tokens, add_bos)


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a generation: what the file names, and a chat model's end-of-turn tokens."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    size = len(tokens) if isinstance(tokens, list) else 0
    ids = [metadata.get(key) for key in END_KEYS]
    if "tokenizer.chat_template" in metadata and isinstance(tokens, list):
        types = np.asarray(metadata.get("tokenizer.ggml.token_type", ()))
        found = [tokens.index(token) for token in END_OF_TURN if token in tokens]
        ids += [i for i in found if types.ndim == 1 and i < len(types) and types[i] == CONTROL]
    return tuple(dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < size))


def _tokens(metadata: Mapping[str, Any], source: str) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not _is_texts(tokens) or not tokens:
        raise CheckpointError(f"{source}: key `tokenizer.ggml.tokens` is missing or not strings")
    named = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(named)) < len(named):
        twice = next(token for token, times in Counter(named).items() if times > 1)
        raise CheckpointError(f"{source}: token {twice[:40]!r} appears twice in the vocabulary")
    return named


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _numbers(metadata: Mapping[str, Any], key: str, size: int, source: str) -> list[Any]:
    """An array as long as the vocabulary; types may be absent, and then all tokens are normal."""
    values = metadata.get(key)
    if values is None and key.endswith("token_type"):
        return [1] * size
    if values is None or isinstance(values, str | int | float) or len(values) != size:
        raise CheckpointError(f"{source}: key `{key}` is not an array of {size}, one per token")
    numbers: list[Any] = np.asarray(values).tolist()
    if not all(isinstance(number, int | float) for number in numbers):
        raise CheckpointError(f"{source}: key `{key}` holds something other than numbers")
    return numbers


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], _types: list[int], source: str
) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{source}: tokenizer.ggml.pre is {str(name)[:40]!r}; known are "
            f"{', '.join(PRE_TOKENIZERS)}",
            hint=did_you_mean(str(name)[:40], PRE_TOKENIZERS)
            or "use the model's Hugging Face folder instead",
        )
    pre = PRE_TOKENIZERS[name]
    merges: Any = metadata.get("tokenizer.ggml.merges")
    if not _is_texts(merges):
        raise CheckpointError(f"{source}: key `tokenizer.ggml.merges` is missing or not strings")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(BPE(vocab=vocab, merges=pairs, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        core.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    core.decoder = decoders.ByteLevel()
    return core, pre.add_bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str
) -> tuple[Tokenizer, bool]:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens), source)
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for i, token in enumerate(tokens) if types[i] == UNKNOWN), None)
    model = BPE(
        vocab=vocab,
        merges=_merges(vocab, scores, types),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    core = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "\u2581")
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), spaces] if prefix else [spaces]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return core, True


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score first, as `LlamaConverter` orders them.

    Tokens that no text may turn into (control, unknown, bytes) take no part.
    """
    plain = {t: i for t, i in vocab.items() if types[i] not in (UNKNOWN, CONTROL, BYTE)}
    found = []
    for token, index in plain.items():
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in plain and pair[1] in plain]
        pairs.sort(key=lambda pair: (plain[pair[0]], plain[pair[1]]))
        found += [(-scores[index], -len(left), -len(right), left, right) for left, right in pairs]
    found.sort(key=lambda item: item[:3])
    return [(left, right) for *_, left, right in found]
