"""Text for encoders: windows between the tokens that the tokenizer puts around every sequence, with
their mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nmsparse_deploy.data.text import Text, TokenSample, calibration_sample
from nmsparse_deploy.errors import NmsparseError, UsageError

MIN_TOKENS = 8
"""Sentences of fewer tokens recur by chance and prove nothing."""


@dataclass(frozen=True)
class SequenceSample(TokenSample):
    """Windows as an encoder reads them. All have the full length, so no padding enters a
    statistic."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}


def calibration_sequences(
    text: Text, tokenizer: Any, samples: int, length: int, seed: int, at_most: bool = False
) -> SequenceSample:
    """Draw `samples` distinct windows of `length` tokens with the special ones, at most what the
    tokenizer allows."""
    length = min(length, max_tokens(tokenizer))
    around = tokenizer.num_special_tokens_to_add(pair=False)
    if length <= around:
        raise UsageError(
            f"A sequence of {length} tokens has no room for text beside {around} special tokens."
        )
    plain = calibration_sample(text, tokenizer, samples, length - around, seed, at_most)
    return _wrapped(plain, tokenizer)


@dataclass(frozen=True)
class PairedSample(SequenceSample):
    """Windows as an encoder-decoder reads them: the decoder is taught the text that the encoder
    sees."""

    start: int = 0

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {**super().inputs, "decoder_input_ids": taught(self.ids, self.start)}


def paired(sample: TokenSample, config: Any) -> PairedSample:
    """Add the decoder's side to a sample."""
    start = decoder_start(config)
    return PairedSample(
        sample.ids, sample.windows, sample.source, sample.fingerprint, sample.note, start
    )


def decoder_start(config: Any) -> int:
    """Return the token that a decoder begins with: what its config says, or padding."""
    named = [getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id")]
    return next((int(token) for token in named if token is not None), 0)


def taught(ids: torch.Tensor, start: int) -> torch.Tensor:
    """Return what a decoder reads while it predicts `ids` `[rows, length]`: the same, one place
    later."""
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)


def max_tokens(tokenizer: Any) -> int:
    """Return how many tokens the tokenizer says its model reads at once; libraries write a huge
    number for "any"."""
    limit = int(getattr(tokenizer, "model_max_length", 0) or 0)
    return limit if 0 < limit < 1_000_000 else 512


def _wrapped(plain: TokenSample, tokenizer: Any) -> SequenceSample:
    special = tokenizer("", add_special_tokens=True)["input_ids"]
    around = tokenizer.num_special_tokens_to_add(pair=False)
    if len(special) != around:
        raise UsageError(
            "This tokenizer's special tokens do not stand at the ends of a sequence; it is not supported."
        )
    before = _leading(tokenizer, special)
    rows = len(plain.ids)
    parts = [
        torch.tensor(special[:before], dtype=torch.long).expand(rows, -1),
        plain.ids,
        torch.tensor(special[before:], dtype=torch.long).expand(rows, -1),
    ]
    ids = torch.cat(parts, 1)
    return SequenceSample(ids, plain.windows, plain.source, plain.fingerprint, plain.note)


def _leading(tokenizer: Any, special: list[int]) -> int:
    """Count the special tokens that stand before the text."""
    words = tokenizer("a b c", add_special_tokens=True)["input_ids"]
    bare = tokenizer("a b c", add_special_tokens=False)["input_ids"]
    return next((n for n in range(len(special) + 1) if words[n : n + len(bare)] == bare), 0)


def check_sentences_disjoint(calibration: torch.Tensor, sentences: Sequence[Sequence[int]]) -> int:
    """Raise `NmsparseError` when a sentence (token ids without special ones) lies in the
    calibration windows.

    Returns how many sentences were long enough to be compared.
    """
    rows = [" " + " ".join(map(str, row)) + " " for row in calibration.tolist()]
    compared = 0
    for sentence in sentences:
        if len(sentence) < MIN_TOKENS:
            continue
        compared += 1
        wanted = " " + " ".join(map(str, sentence)) + " "
        if any(wanted in row for row in rows):
            raise NmsparseError(
                "A sentence of the evaluation lies in the calibration text; a score on it means "
                "nothing.",
                "choose another --data for the calibration",
            )
    return compared
