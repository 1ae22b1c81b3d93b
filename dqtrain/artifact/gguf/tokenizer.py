"""A Hugging Face tokenizer as the fields of a GGUF file from which llama.cpp makes the same token ids.

llama.cpp has three kinds that matter here: `gpt2` is byte-level BPE, cut into words by an expression that it knows by name; `llama` is
sentencepiece's BPE, which joins the pair of the best score; `t5` is sentencepiece's unigram model with its table of normalisation.
"""

import base64
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dqtrain.data.chat import chat_template
from dqtrain.data.prepare import load_tokenizer
from dqtrain.errors import ConfigError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXPRESSIONS = {_WORDS.replace("DIGITS", r"\p{N}"): "qwen2", _WORDS.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe"}
"""What cuts a text into words -> llama.cpp's name for it."""


def tokenizer_fields(folder: Path, config: PretrainedConfig, writer: Any) -> None:
    """Add the tokenizer in a folder to a `gguf.GGUFWriter`. Raises ConfigError for one that llama.cpp does not have, DataError for one that cannot be read."""
    tokenizer = load_tokenizer(folder)
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model, size = told["model"], config.vocab_size
    if len(tokenizer) > size:
        raise ConfigError(f"{folder}: the tokenizer has {len(tokenizer)} words, but the model {size}; llama.cpp wants no more words than the model has.")
    kind = model["type"]
    if kind == "BPE" and not model.get("byte_fallback"):
        name, tokens, types, scores = _byte_level(told, folder, writer)
    elif kind == "BPE":
        name, tokens, types, scores = _sentencepiece(told, folder, writer)
    elif kind == "Unigram":
        name, tokens, types, scores = _unigram(told, folder, writer)
    else:
        raise _unknown(folder, f"its model is {kind}")
    writer.add_tokenizer_model(name)
    for added in told["added_tokens"]:
        tokens[added["id"]] = added["content"]
        if types.get(added["id"]) != _UNKNOWN:
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([types.get(i, _UNUSED) for i in range(size)])
    if scores is not None:
        writer.add_token_scores([scores.get(i, -1e4) for i in range(size)])
    plain, framed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts, ends = framed[:1] == [bos] != plain[:1], framed[-1:] == [eos] != plain[-1:]
    if framed != [bos] * starts + plain + [eos] * ends:
        raise _unknown(folder, f"it puts {len(framed) - len(plain)} tokens around a text, and they are not bos_token and eos_token alone")
    writer.add_bos_token_id(bos if bos is not None else eos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(ends)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    unknown = next((i for i, kind in types.items() if kind == _UNKNOWN), None)
    if unknown is not None:
        writer.add_unk_token_id(unknown)
    if tokenizer.chat_template is not None:
        # Without a bos_token of its own the file has the end in its place, which a template must not write.
        writer.add_chat_template(("{% set bos_token = '' %}" if bos is None else "") + chat_template(tokenizer))


def _unknown(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{folder}: llama.cpp has no such tokenizer ({what}). It has byte-level BPE with the words of GPT-2, Qwen 2, Llama 3 or SmolLM, and sentencepiece's BPE "
        "and unigram models. Use the target packed, or hf."
    )


_Fields = tuple[str, dict[int, str], dict[int, int], dict[int, float] | None]


def _steps(told: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if told is None:
        return []
    return told[key] if told["type"] == "Sequence" else [told]


def _byte_level(told: dict[str, Any], folder: Path, writer: Any) -> _Fields:
    model, steps = told["model"], _steps(told["pre_tokenizer"], "pretokenizers")
    for step in _steps(told["normalizer"], "normalizers"):
        if step["type"] != "NFC":  # which most text is already
            raise _unknown(folder, f"it normalises by {step['type']}")
    if (
        not steps
        or steps[-1]["type"] != "ByteLevel"
        or steps[-1]["add_prefix_space"]
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        raise _unknown(folder, "it is no byte-level BPE without a space in front")
    first, ignores_merges = steps[0], bool(model.get("ignore_merges"))
    if len(steps) == 1 and first.get("use_regex", True):
        name: str | None = "gpt-2"
    elif len(steps) == 2 and first["type"] == "Split" and not steps[1].get("use_regex", True):
        name = _EXPRESSIONS.get(first["pattern"].get("Regex", "")) if first["behavior"] == "Isolated" and not first["invert"] else None
    elif len(steps) == 2 and first["type"] == "Digits" and first["individual_digits"] and steps[1].get("use_regex", True):
        name = "smollm"
    else:
        name = None
    if name is None or ignores_merges != (name == "llama-bpe"):
        raise _unknown(folder, f"it cuts words by {json.dumps(told['pre_tokenizer'])[:200]}")
    writer.add_tokenizer_pre(name)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise _unknown(folder, "it has no merges")
    writer.add_token_merges(merges)
    tokens = {i: token for token, i in model["vocab"].items()}
    return "gpt2", tokens, dict.fromkeys(tokens, _NORMAL), None


def _sentencepiece(told: dict[str, Any], folder: Path, writer: Any) -> _Fields:
    model = told["model"]
    steps = _steps(told["normalizer"], "normalizers") + _steps(told["pre_tokenizer"], "pretokenizers")
    prefix = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == "▁":
            prefix = step["prepend_scheme"] != "never"
        elif step["type"] != "Replace" or step["pattern"] != {"String": " "} or step["content"] != "▁":
            raise _unknown(folder, f"it has a step {step['type']}")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)
    writer.add_remove_extra_whitespaces(False)
    tokens = {i: token for token, i in model["vocab"].items()}
    types = {i: _BYTE if len(token) == 6 and token.startswith("<0x") else _NORMAL for i, token in tokens.items()}
    if model["unk_token"] is not None:
        types[model["vocab"][model["unk_token"]]] = _UNKNOWN
    # What is joined first has the best score; what no merge makes is never joined.
    scores = dict.fromkeys(tokens, 0.0)
    for rank, merge in reversed(list(enumerate(model["merges"]))):
        joined = merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
        scores[model["vocab"][joined]] = -1.0 - rank
    return "llama", tokens, types, scores


def _unigram(told: dict[str, Any], folder: Path, writer: Any) -> _Fields:
    model = told["model"]
    prefix, charsmap, spaces = False, None, set()
    for step in _steps(told["normalizer"], "normalizers") + _steps(told["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Metaspace" and step["replacement"] == "▁":
            prefix = step["prepend_scheme"] != "never"
        elif step["type"] == "WhitespaceSplit":
            spaces |= {"at the end", "doubled"}
        elif step["type"] == "Strip" and step["strip_right"]:
            spaces.add("at the end")
        elif step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"} and step["content"] in (" ", "▁"):
            spaces.add("doubled")
        else:
            raise _unknown(folder, f"it has a step {step['type']}")
    if len(spaces) == 1:
        raise _unknown(folder, f"it removes spaces that are {spaces.pop()}, and leaves others")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)
    writer.add_remove_extra_whitespaces(bool(spaces))
    if charsmap:
        writer.add_precompiled_charsmap(charsmap)
    tokens = {i: token for i, (token, _) in enumerate(model["vocab"])}
    types = dict.fromkeys(tokens, _NORMAL)
    if model["unk_id"] is None:
        raise _unknown(folder, "it has no unknown word")
    types[model["unk_id"]] = _UNKNOWN
    return "t5", tokens, types, {i: score for i, (_, score) in enumerate(model["vocab"])}
