"""Two-block models and a byte tokenizer, built in code: the real pipeline runs on them in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 260


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {character: i for i, character in enumerate(alphabet)} | {"<end>": len(alphabet)}
    core = Tokenizer(models.BPE(vocab=table, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
                "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 256}
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=128,
                                      bos_token_id=256, eos_token_id=256)).eval()


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text(folder: Path, name: str, seed: int, words: int = 3000) -> Path:
    """A text file of made-up words: different seeds share no long run of tokens."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (words, 6), generator=generator).tolist()
    file = folder / name
    file.write_text(" ".join("".join(map(chr, word)) for word in letters))
    return file
