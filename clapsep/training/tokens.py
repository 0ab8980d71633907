"""The word-level tokenizer of the embedded default: a word it was not taught becomes `<unk>`.

Special tokens and their ids are RoBERTa's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def build_tokenizer(words: Sequence[str], max_tokens: int) -> Tokenizer:
    """A tokenizer that knows exactly `words`. Case and punctuation are ignored, texts cut at `max_tokens`."""
    ids = {token: index for index, token in enumerate((*SPECIAL, *sorted(set(words) - set(SPECIAL))))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}\s]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing(sep=("</s>", 2), cls_token=("<s>", 0))
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def without(tokenizer: Tokenizer, known: Sequence[str]) -> Tokenizer:
    """A copy that knows only `known` of its words; the ids of those stay."""
    description = json.loads(tokenizer.to_str())
    ids = description["model"]["vocab"]
    description["model"]["vocab"] = {w: i for w, i in ids.items() if w in SPECIAL or w in set(known)}
    return Tokenizer.from_str(json.dumps(description))


def tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(input ids, attention mask), each (texts, tokens) int64, padded to the longest text."""
    encodings = tokenizer.encode_batch(list(texts))
    return torch.tensor([e.ids for e in encodings]), torch.tensor([e.attention_mask for e in encodings])
