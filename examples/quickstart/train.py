"""Train a tiny Llama, and fine-tune it three times on the same text in three different orders.

`python -m examples.quickstart.train` makes models/base and models/order-1 to order-3, but for those that are there.
The text is `pydoc_data.topics`, which every CPython carries.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

OUT = Path("models")
CONTEXT = 512  # tokens
BATCH = 8  # samples
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # as `train_tokenizer` numbers them
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as transformers ships it


def paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text.strip("\n")) if paragraph.strip()]


def join(pieces: Iterable[str], limit: int) -> list[str]:
    """Join consecutive paragraphs up to `limit` characters; cut a longer one between its lines."""
    passages: list[str] = []
    for paragraph in pieces:
        lines = [paragraph]
        if len(paragraph) > limit:
            lines = [line[i : i + limit] for line in paragraph.split("\n") for i in range(0, len(line) or 1, limit)]
        for number, piece in enumerate(lines):
            separator = "\n" if number else "\n\n"
            if passages and len(passages[-1]) + len(separator) + len(piece) <= limit:
                passages[-1] += separator + piece
            else:
                passages.append(piece)
    return passages


def groups(passages: list[str]) -> list[int]:
    """The first passage that each shares eight words with, or through others: no such run is to be in two parts."""
    leader = list(range(len(passages)))

    def find(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    holder: dict[tuple[str, ...], int] = {}
    for index, passage in enumerate(passages):
        words = re.findall(r"\w+", passage.lower())
        for start in range(max(1, len(words) - 7)):
            one, other = find(holder.setdefault(tuple(words[start : start + 8]), index)), find(index)
            leader[max(one, other)] = min(one, other)
    return [find(index) for index in range(len(passages))]


def split(
    limit: int = 400, base: float = 0.45, held_out: float = 0.15, most: int | None = None
) -> dict[str, list[str]]:
    """Split the text into passages for base, fine-tuning and held-out loss, by a hash of their groups."""
    seen: set[str] = set()
    passages: list[str] = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name))[:most]:
        fresh: dict[str, str] = {}  # topics repeat one another: paragraphs that have not occurred yet
        for paragraph in paragraphs(topics[name]):
            fresh.setdefault(" ".join(paragraph.split()), paragraph)
        passages += join([text for words, text in fresh.items() if words not in seen], limit)
        seen.update(fresh)
    parts: dict[str, list[str]] = {"base": [], "fine_tuning": [], "held_out": []}
    for first, passage in zip(groups(passages), passages, strict=True):
        place = int.from_bytes(hashlib.sha256(passages[first].encode()).digest()[:8], "big") / 2**64
        parts["base" if place < base else "held_out" if place >= 1 - held_out else "fine_tuning"].append(passage)
    return parts


def permutation(samples: int, seed: int | str, epoch: int) -> list[int]:
    """The order of the samples in an epoch, the one thing in which sub-models differ: sorted by a hash."""
    return sorted(range(samples), key=lambda index: hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest())


def train_tokenizer(passages: Iterable[str], vocab_size: int, context: int) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts a start token before a text, as Llama's does."""
    bos, eos, pad = special = ["<s>", "</s>", "<pad>"]
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(passages, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    settings = {"model_max_length": context, "padding_side": "right", "clean_up_tokenization_spaces": False}
    fast = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, **settings)  # type: ignore[no-untyped-call]  # as transformers ships it


def encode(passage: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*tokenizer(passage)["input_ids"], tokenizer.eos_token_id]


def batches(samples: list[list[int]], order: int, epochs: int, pad: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of all epochs, padded on the right; there is a loss on all tokens but the start and the padding."""
    for epoch in range(epochs):
        indices = permutation(len(samples), order, epoch)
        for start in range(0, len(indices), BATCH):
            chosen = [torch.tensor(samples[index]) for index in indices[start : start + BATCH]]
            ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(sample) for sample in chosen], batch_first=True)
            labels = ids.masked_fill(mask == 0, -100)  # no loss
            labels[:, 0] = -100
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: PreTrainedModel, samples: list[list[int]], order: int, epochs: int, rate: float) -> None:
    steps = epochs * -(-len(samples) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = transformers.get_scheduler("cosine", optimizer, 10, steps)  # 10 steps of warm-up
    model.train()
    for step, batch in enumerate(batches(samples, order, epochs, model.config.pad_token_id), start=1):
        loss = model(**batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 60 == 0 or step == steps:
            print(f"  step {step} of {steps}, loss {loss.item():.3f}", flush=True)


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums are split over threads, so their number decides the last bits
    parts = split()
    for name, order in {"base": 0, "order-1": 1, "order-2": 2, "order-3": 3}.items():
        if (OUT / name).exists():
            print(f"{OUT / name}: there already")
            continue
        print(f"{OUT / name}: training", flush=True)
        if name == "base":
            transformers.set_seed(0)
            tokenizer: PreTrainedTokenizerBase = train_tokenizer(parts["base"], 1024, CONTEXT)
            config = transformers.LlamaConfig(vocab_size=1024, max_position_embeddings=CONTEXT, **SHAPE, **TOKENS)
            model: PreTrainedModel = transformers.LlamaForCausalLM(config)
            train(model, [encode(passage, tokenizer) for passage in parts["base"]], order, epochs=10, rate=3e-3)
        else:
            tokenizer = AutoTokenizer.from_pretrained(OUT / "base")
            model = AutoModelForCausalLM.from_pretrained(OUT / "base", dtype=torch.float32)
            train(model, [encode(passage, tokenizer) for passage in parts["fine_tuning"]], order, epochs=3, rate=3e-4)
        aside = OUT / f".{name}.unfinished"  # an interrupted run leaves no half of a model
        torch.nn.Module.to(model, torch.bfloat16)  # past an annotation that asks for a model
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(OUT / name)


if __name__ == "__main__":
    main()
