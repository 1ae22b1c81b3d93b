"""Tiny tokenizers whose ids can be told by hand: one id per word, and the special tokens of three families."""

from pathlib import Path

import pytest

WORDS = "a b c d e f g h say :".split()
SPECIAL = {"gpt2": ["<|endoftext|>"], "bart": ["<s>", "<pad>", "</s>", "<unk>"], "t5": ["<pad>", "</s>", "<unk>"]}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    """Family -> directory; the ids are those of SPECIAL and then of WORDS, in their order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("tokenizers")
    for family, special in SPECIAL.items():
        ids = {word: number for number, word in enumerate([*special, *WORDS])}
        unknown = "<unk>" if "<unk>" in ids else special[0]
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        eos = "</s>" if "</s>" in ids else special[0]
        template = {"bart": "<s> $A </s>", "t5": "$A </s>"}.get(family)
        if template:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=[(word, ids[word]) for word in ("<s>", "</s>") if word in ids]
            )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token=unknown).save_pretrained(root / family)
    return {family: root / family for family in SPECIAL}
