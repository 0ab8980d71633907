"""The tokenizer of the embedded default: known words are one token, others are spelled in parts of words.

Special tokens and their ids are RoBERTa's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import Tensor

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def build_tokenizer(words: Sequence[str], max_tokens: int) -> Tokenizer:
    """A tokenizer of `words` and parts of words (`##ing`).

    Case and punctuation are ignored, texts cut at `max_tokens`; what cannot be spelled is `<unk>`.
    """
    ids = {token: index for index, token in enumerate((*SPECIAL, *sorted(set(words) - set(SPECIAL))))}
    tokenizer = Tokenizer(WordPiece(ids, unk_token="<unk>", max_input_chars_per_word=40))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}\s]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing(sep=("</s>", 2), cls_token=("<s>", 0))
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(input ids, attention mask), each (texts, tokens) int64, padded to the longest text."""
    encodings = tokenizer.encode_batch(list(texts))
    return torch.tensor([e.ids for e in encodings]), torch.tensor([e.attention_mask for e in encodings])
