"""What a GGUF file says of a tokenizer: tokens with their kinds, merges or scores, and how text is split first."""

from __future__ import annotations

import json
from typing import Any

from .architectures import GGUFError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of tokens."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS_FIRST = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASES = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]{first}[{_LOWER}]{last}" for first, last in (("*", "+"), ("+", "*")))
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _CONTRACTIONS + _LETTERS_FIRST + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + _LETTERS_FIRST + r"|\p{N}" + _REST: "qwen2",
    "|".join(_CASES) + r"|\p{N}" + _SLASHES: "tekken",
    "|".join(case + _CONTRACTIONS + "?" for case in _CASES) + r"|\p{N}{1,3}" + _SLASHES: "gpt-4o",
}
"""Regular expressions by which text is split before the merges -> llama.cpp's names for them."""


def vocabulary_settings(tokenizer, size: int, pre_tokenizer: str | None = None) -> dict[str, Any]:
    """Keys of the file below `tokenizer.`.

    Args:
        tokenizer: a fast tokenizer of transformers, byte-level BPE or BPE of SentencePiece's kind.
        size (`int`): rows of the model's embeddings; ids that the tokenizer does not use get placeholders.
        pre_tokenizer (`str`, *optional*): llama.cpp's name of how text is split before the merges; by default found by
            the tokenizer's own rule.

    Raises:
        GGUFError: a tokenizer of another kind, or one that splits text in a way without a name in llama.cpp.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise GGUFError(f"tokenizer must be a fast one, of the tokenizers library, got {type(tokenizer).__name__}")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise GGUFError(f"tokenizer must be a BPE model, got {model['type']}")
    if len(tokenizer) > size:
        raise GGUFError(f"tokenizer has {len(tokenizer)} tokens, the model's embeddings have {size} rows")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    byte_level = "ByteLevel" in _kinds(state.get("decoder"))
    tokens, kinds = _tokens(tokenizer, size, byte_level, model.get("unk_token"))
    settings: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": kinds}
    if byte_level:
        settings |= {
            "ggml.model": "gpt2",
            "ggml.pre": pre_tokenizer or _name_of_split(state.get("pre_tokenizer")),
            "ggml.merges": [" ".join(pair) for pair in pairs],
        }
    else:
        if not model.get("byte_fallback"):
            raise GGUFError(
                "tokenizer must be byte-level, or fall back on bytes as SentencePiece's do; it does neither"
            )
        settings |= {
            "ggml.model": "llama",
            "ggml.pre": pre_tokenizer or _no_split(state.get("pre_tokenizer")),
            "ggml.scores": _scores(tokens, pairs),
            "ggml.add_space_prefix": _puts_space_first(tokenizer),
        }
    return {**settings, **_special_tokens(tokenizer)}


def _kinds(part: dict | None) -> list[str]:
    """The types of a part of a tokenizer, those inside sequences included."""
    if part is None:
        return []
    inside = [kind for name in ("decoders", "pretokenizers") for one in part.get(name, ()) for kind in _kinds(one)]
    return [part["type"], *inside]


def _tokens(tokenizer, size: int, byte_level: bool, unknown: str | None) -> tuple[list[str], list[int]]:
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(size):
        token = by_id.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", UNUSED
        elif token == unknown and not byte_level:
            kind = UNKNOWN
        elif index in added:
            kind = CONTROL if added[index].special else USER_DEFINED
        elif not byte_level and len(token) == 6 and token.startswith("<0x"):
            kind = BYTE
        else:
            kind = NORMAL
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _scores(tokens: list[str], pairs: list[list[str]]) -> list[float]:
    """llama.cpp merges the pair with the highest score first: the earlier a merge, the higher its token's.

    It merges every pair that makes a token, so the tokenizer has to do that too, as SentencePiece's do.
    """
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, i)
    known, merged = set(tokens), {(left, right) for left, right in pairs}
    for token in rank:
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair not in merged and known.issuperset(pair):
                raise GGUFError(
                    f"the tokenizer does not merge {pair[0]!r} and {pair[1]!r}, of which llama.cpp makes its token {token!r}"
                )
    return [-float(rank.get(token, len(pairs))) for token in tokens]


def _puts_space_first(tokenizer) -> bool:
    first = tokenizer.tokenize("a")
    return bool(first) and first[0].startswith("▁")


def _no_split(part: dict | None) -> str:
    """The name for text that is merged whole; at most its spaces were replaced before."""
    if part is None or part["type"] == "Metaspace" or (part["type"] == "Split" and part["pattern"] == {"String": " "}):
        return "default"
    return _name_of_split(part)


def _name_of_split(part: dict | None) -> str:
    parts = [] if part is None else part.get("pretokenizers", [part])
    kinds = [one["type"] for one in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"] and parts[0]["behavior"] == "Isolated":
        name = SPLITS.get(parts[0]["pattern"].get("Regex"))
        if name is not None:
            return name
    raise GGUFError(
        "the tokenizer splits text before its merges in a way that has no name here; give llama.cpp's name of a way that "
        f"does the same as pre_tokenizer, for example {', '.join(sorted({'gpt-2', 'smollm', *SPLITS.values()}))}"
    )


def _special_tokens(tokenizer) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"ggml.{name}_token_id": getattr(tokenizer, f"{ours}_token_id") for ours, name in names.items()}
    found = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    settings = {
        **{name: value for name, value in ids.items() if value is not None},
        "ggml.add_bos_token": bos is not None and found[:1] == [bos],
        "ggml.add_eos_token": eos is not None and found[-1:] == [eos],
    }
    if isinstance(tokenizer.chat_template, str):
        settings["chat_template"] = tokenizer.chat_template
    return settings
