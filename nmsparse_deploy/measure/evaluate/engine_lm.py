"""An engine as a language model of lm-evaluation-harness. Imports `lm_eval`, so only tasks import
it.

The engine takes `input_ids` and returns logits, without a cache: scoring is one pass a request, and
a continuation is decoded greedily with one pass a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

GENERATED = 256
"""Tokens of a continuation where a task names no number; lm-evaluation-harness has the same."""


class EngineLM(TemplateLM):
    """`run` maps token ids `[1, length]` to logits `[1, length, vocabulary]`; `longest` is the
    model's context."""

    def __init__(
        self, run: Callable[[np.ndarray], np.ndarray], tokenizer: Any, longest: int
    ) -> None:
        super().__init__()
        self.run = run
        self.tokenizer = tokenizer
        self.longest = longest

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        first = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and first and string.startswith(first):
            options = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **options))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether greedy decoding would have
        chosen it."""
        return [self._score(context, continuation) for _, context, continuation in requests]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = [*context, *continuation][-(self.longest + 1) :]
        logits = self._logits(ids[:-1])[-len(continuation) :]
        wanted = torch.tensor(continuation[-len(logits) :])
        chosen = logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).sum()
        return float(chosen), bool((logits.argmax(-1) == wanted).all())

    def _logits(self, ids: list[int]) -> torch.Tensor:
        return torch.from_numpy(self.run(np.array([ids], dtype=np.int64))[0]).float()

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts: every token once, in windows of the model's context."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.longest, 1
            )
            totals.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first stop text. Raises `ValueError` when a task
        asks for sampling."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") and settings.get("temperature", 1.0):
            raise ValueError("this engine decodes greedily, and the task asks for sampling")
        stops = settings.get("until") or []
        stops = [text for text in ([stops] if isinstance(stops, str) else stops) if text]
        new_tokens = int(settings.get("max_gen_toks", GENERATED))
        if new_tokens >= self.longest:
            raise ValueError(
                f"{new_tokens} new tokens are longer than the {self.longest} that the model takes"
            )
        ids, written = self.tok_encode(context)[new_tokens - self.longest :], list[int]()
        text = ""
        while len(written) < new_tokens:
            token = int(self._logits([*ids, *written])[-1].argmax())
            if token == self.eot_token_id:
                break
            written.append(token)
            text = self.tokenizer.decode(written, skip_special_tokens=True)
            if any(stop in text for stop in stops):
                break
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
