"""Print the held-out loss of models, and the share of their parameters that have the bits of the first one's.

python -m examples.quickstart.compare models/base models/order-1 selection=out
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart.train import encode, split

named = {name or Path(path).name: Path(path) for name, _, path in (one.rpartition("=") for one in sys.argv[1:])}
base, *_ = named
before = load_file(named[base] / "model.safetensors")
for name, folder in named.items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, tokens = 0.0, 0
    for passage in split()["held_out"]:
        ids = torch.tensor([encode(passage, tokenizer)])
        with torch.inference_mode():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    after = load_file(folder / "model.safetensors")
    same = sum(int((after[key].view(torch.int16) == before[key].view(torch.int16)).sum()) for key in before)
    if name == base:
        print(f"held-out loss in nats per token, over {tokens:,} tokens\n")
        print(f"{'model':<10}  {'loss':>7}  {'perplexity':>10}  equal to {name}")
    share = f"{same / sum(tensor.numel() for tensor in before.values()):.2%}" if name != base else ""
    print(f"{name:<10}  {total / tokens:>7.4f}  {math.exp(total / tokens):>10.3f}  {share:>13}".rstrip(), flush=True)
