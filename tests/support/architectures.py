"""Tiny random models of many architectures: how each is made, asked for logits, and named by mergekit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

from tests.support.checkpoints import changed
from tests.support.expectation import Integers, Stored
from tests.support.models import Family, write_family

TOKENS = torch.tensor([[5, 9, 3, 17, 22, 8], [7, 7, 30, 41, 2, 11]])
SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
)
ENCODER: dict[str, Any] = {**SIZES, "intermediate_size": 24}
DECODER: dict[str, Any] = {**ENCODER, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2)
VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
HEADS: dict[str, Any] = dict(head_dim=8)  # known to the class, if not to its signature, as is the next
UNTIED: dict[str, Any] = dict(tie_word_embeddings=False)
T5: dict[str, Any] = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)


def text(**more: Any) -> dict[str, Any]:
    return {"input_ids": TOKENS, **more}


def image(token: int, count: int, **more: Any) -> dict[str, Any]:
    """A prompt with room for an image of so many tokens."""
    return {"input_ids": torch.tensor([[5, *[token] * count, 9, 3]]), **more}


def pixels(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape)


@dataclass(frozen=True, eq=False)
class Architecture:
    """A class of transformers, the configuration of a tiny model, and what is special about it.

    `aligned` gives a file's tensors the names and shapes that mergekit gives them; `renamed` leads from these names to
    those of the model's state dict; `old_tensors` are what older files carry besides, of which transformers fills in
    none that match `ignored`. A `gap` is what mergekit says
    where it cannot merge, `not_loaded` a tensor that transformers misses in what mergekit writes, with any method.
    """

    title: str
    model: Any
    config: Any
    inputs: dict[str, Any] = field(default_factory=text)
    aligned: Callable[[Mapping[str, Stored]], Mapping[str, Stored]] = lambda tensors: tensors
    renamed: tuple[tuple[str, str], ...] = ()
    old_tensors: Callable[[Any], dict[str, torch.Tensor]] | None = None
    ignored: str | None = None
    gap: str | None = None
    not_loaded: str | None = None
    note: str = ""

    def __str__(self) -> str:
        return self.title

    def state_name(self, name: str) -> str:
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name


def write_models(architecture: Architecture, folder: Path) -> Family:
    """A base of this architecture and three variants, with the tensors of older files where there are any."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family = write_family(folder, architecture.model(architecture.config))
        if old_tensors := architecture.old_tensors:
            for target in family.everyone:
                changed(target, lambda tensors: tensors.update(old_tensors(architecture.config)))
    return family


def fused_experts(names: tuple[str, str, str], outer: str) -> Callable[[Mapping[str, Stored]], Mapping[str, Stored]]:
    """Experts that the files hold one by one, as the two tensors a layer that transformers 5 and mergekit have."""
    gate, up, down = names

    def fuse(tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
        rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        result = {name.replace(f".{outer}.gate.", ".mlp.gate."): tensor for name, tensor in rest.items()}
        for layer in range(2):
            inside, outside = f"model.layers.{layer}.{outer}.experts", f"model.layers.{layer}.mlp.experts"

            def stacked(name: str, inside: str = inside) -> Integers:
                experts = [tensors[f"{inside}.{expert}.{name}.weight"] for expert in range(4)]
                return np.stack([expert.bits.reshape(expert.shape) for expert in experts])

            for target, bits in [
                ("gate_up_proj", np.concatenate([stacked(gate), stacked(up)], axis=1)),
                ("down_proj", stacked(down)),
            ]:
                result[f"{outside}.{target}"] = Stored("BF16", bits.shape, bits.reshape(-1))
        return result

    return fuse


def neox_buffers(config: Any) -> dict[str, torch.Tensor]:
    """What GPT-NeoX files (Pythia among them) hold besides if an older transformers wrote them."""
    size = config.max_position_embeddings
    buffers = {
        "bias": torch.ones(size, size, dtype=torch.bool).tril().view(1, 1, size, size),
        "masked_bias": torch.tensor(-1e9, dtype=torch.bfloat16),
        "rotary_emb.inv_freq": torch.tensor([1.0]),
    }
    return {f"gpt_neox.layers.{k}.attention.{name}": value.clone() for k in range(2) for name, value in buffers.items()}


def bert_pooler(config: Any) -> dict[str, torch.Tensor]:
    """The pooler that files of BERT hold if they were written with the head for the next sentence."""
    weight = torch.randn(config.hidden_size, config.hidden_size, dtype=torch.bfloat16)
    return {"bert.pooler.dense.weight": weight, "bert.pooler.dense.bias": weight[0].clone()}


MISTRAL3 = tf.Mistral3Config(
    text_config=dict(model_type="mistral", **DECODER, head_dim=8),
    vision_config={**VISION, "model_type": "pixtral", "head_dim": 8, "image_size": 32},
    image_token_index=63,
)
ROPE: dict[str, Any] = dict(rope_type="default", mrope_section=[1, 1, 2])
QWEN_VISION: dict[str, Any] = dict(depth=3, num_heads=2, patch_size=4, spatial_merge_size=2, hidden_size=16)
QWEN_TOKENS: dict[str, Any] = dict(
    image_token_id=63, video_token_id=62, vision_start_token_id=61, vision_end_token_id=60
)
QWEN_IMAGE = image(
    63,
    4,
    pixel_values=pixels(16, 96),
    image_grid_thw=torch.tensor([[1, 4, 4]]),
    mm_token_type_ids=torch.tensor([[0, 1, 1, 1, 1, 0, 0]]),
)
VISION_NAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)

WORKING = [
    Architecture("Llama", tf.LlamaForCausalLM, tf.LlamaConfig(**DECODER)),
    Architecture("Mistral", tf.MistralForCausalLM, tf.MistralConfig(**DECODER)),
    Architecture("Qwen2", tf.Qwen2ForCausalLM, tf.Qwen2Config(**DECODER)),
    Architecture("Qwen3", tf.Qwen3ForCausalLM, tf.Qwen3Config(**DECODER, head_dim=8)),
    Architecture("Gemma 2", tf.Gemma2ForCausalLM, tf.Gemma2Config(**DECODER, head_dim=8)),
    Architecture("Gemma 3 (text)", tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**DECODER, head_dim=8)),
    Architecture("Phi-3", tf.Phi3ForCausalLM, tf.Phi3Config(**DECODER)),
    Architecture(
        "GPT-2", tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    Architecture(
        "GPT-NeoX, files with attention buffers",
        tf.GPTNeoXForCausalLM,
        tf.GPTNeoXConfig(**ENCODER),
        old_tensors=neox_buffers,
        renamed=((r"^embed_out\.", "lm_head."),),
        ignored=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
        note="as older versions of transformers wrote them",
    ),
    Architecture("OLMo 2", tf.Olmo2ForCausalLM, tf.Olmo2Config(**DECODER)),
    Architecture(
        "Mixtral",
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**DECODER, **EXPERTS, num_local_experts=4),
        aligned=fused_experts(("w1", "w3", "w2"), "block_sparse_moe"),
        note="mergekit joins the experts of a layer in one tensor; it is drawn by that tensor's name",
    ),
    Architecture(
        "Qwen3-MoE",
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig(**DECODER, **EXPERTS, **HEADS, num_experts=4, moe_intermediate_size=12),
        aligned=fused_experts(("gate_proj", "up_proj", "down_proj"), "mlp"),
        note="experts joined, as for Mixtral",
    ),
    Architecture(
        "T5 1.1 (gated, untied: Flan-T5 too)",
        tf.T5ForConditionalGeneration,
        tf.T5Config(**T5, **UNTIED, feed_forward_proj="gated-gelu"),
        inputs=text(decoder_input_ids=TOKENS[:, :3]),
    ),
    Architecture("BERT, sequence classification", tf.BertForSequenceClassification, tf.BertConfig(**ENCODER)),
    Architecture("RoBERTa, masked LM", tf.RobertaForMaskedLM, tf.RobertaConfig(**ENCODER)),
    Architecture("RoBERTa, sequence classification", tf.RobertaForSequenceClassification, tf.RobertaConfig(**ENCODER)),
    Architecture(
        "Mistral 3 (vision and language)",
        tf.Mistral3ForConditionalGeneration,
        MISTRAL3,
        inputs=image(63, 2, pixel_values=pixels(1, 3, 16, 32), image_sizes=torch.tensor([[16, 32]])),
        renamed=VISION_NAMES,
    ),
    Architecture(
        "Qwen2.5-VL (vision and language)",
        tf.Qwen2_5_VLForConditionalGeneration,
        tf.Qwen2_5_VLConfig(
            text_config=dict(**DECODER, rope_scaling=ROPE),
            vision_config=dict(**QWEN_VISION, out_hidden_size=16, intermediate_size=24, fullatt_block_indexes=[1]),
            **QWEN_TOKENS,
        ),
        inputs=QWEN_IMAGE,
        renamed=((r"^visual\.", "model.visual."), (r"^model\.(?!visual)", "model.language_model.")),
    ),
    Architecture(
        "Qwen3-VL (vision and language)",
        tf.Qwen3VLForConditionalGeneration,
        tf.Qwen3VLConfig(
            text_config=dict(**DECODER, head_dim=8, rope_scaling=ROPE),
            vision_config=dict(
                **QWEN_VISION,
                out_hidden_size=16,
                intermediate_size=24,
                num_position_embeddings=16,
                deepstack_visual_indexes=[0, 1, 2],
            ),
            **QWEN_TOKENS,
        ),
        inputs=QWEN_IMAGE,
    ),
    Architecture(
        "OPT",
        tf.OPTForCausalLM,
        tf.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16),
        note="mergekit has no description of it and infers the tensors",
    ),
    Architecture("SmolLM3", tf.SmolLM3ForCausalLM, tf.SmolLM3Config(**DECODER), note="inferred, with tied embeddings"),
    Architecture("ELECTRA, masked LM", tf.ElectraForMaskedLM, tf.ElectraConfig(**ENCODER), note="inferred"),
]

GAPS = [
    Architecture(
        "GPT-NeoX, files without attention buffers",
        tf.GPTNeoXForCausalLM,
        tf.GPTNeoXConfig(**ENCODER),
        gap=r"^Tensor gpt_neox\.layers\.0\.attention\.bias required but not present in model ",
        note="mergekit demands `attention.bias`, which transformers no longer writes",
    ),
    Architecture(
        "T5 1.0 (ReLU)",
        tf.T5ForConditionalGeneration,
        tf.T5Config(**T5),
        gap=r"^Tensor decoder\.block\.0\.layer\.2\.DenseReluDense\.wi_1\.weight required but not present in model ",
        note="mergekit's description has the gated layers of T5 1.1 only",
    ),
    Architecture(
        "Whisper",
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        ),
        gap=r"^Tensor model\.(de|en)coder(layers\.0|embed|conv|layer)\S* required but not present in model ",
        note="mergekit's description lacks a dot: it looks for `model.decoderlayers.0…`",
    ),
    Architecture(
        "BERT, masked LM, files without pooler",
        tf.BertForMaskedLM,
        tf.BertConfig(**ENCODER),
        gap=r"^Tensor bert\.pooler\.dense\.weight required but not present in model ",
        note="mergekit demands the pooler, which this class has not",
    ),
    Architecture(
        "BERT, masked LM, files with pooler",
        tf.BertForMaskedLM,
        tf.BertConfig(**ENCODER),
        old_tensors=bert_pooler,
        not_loaded="cls.predictions.transform.dense.weight",
        note="mergekit leaves out `cls.predictions.transform` when it writes",
    ),
    Architecture(
        "Gemma 3 (vision and language)",
        tf.Gemma3ForConditionalGeneration,
        tf.Gemma3Config(
            text_config=dict(**DECODER, head_dim=8), vision_config=VISION, mm_tokens_per_image=4, image_token_index=63
        ),
        gap=r"^Tensor vision_tower\.vision_model\.\S+ required but not present in model ",
        note="the names in mergekit's description are not those that transformers 5 writes",
    ),
    Architecture(
        "Qwen2-VL (vision and language)",
        tf.Qwen2VLForConditionalGeneration,
        tf.Qwen2VLConfig(
            text_config=dict(**DECODER, rope_scaling=ROPE),
            vision_config={**QWEN_VISION, "embed_dim": 16, "mlp_ratio": 2},
            **QWEN_TOKENS,
        ),
        gap=r"has no attribute num_hidden_layers$",
        note="mergekit looks for the number of layers where transformers 5 no longer has it",
    ),
    Architecture(
        "LLaVA (vision and language)",
        tf.LlavaForConditionalGeneration,
        tf.LlavaConfig(
            text_config=dict(model_type="llama", **DECODER),
            vision_config=dict(model_type="clip_vision_model", projection_dim=16, **VISION),
            image_token_index=63,
        ),
        not_loaded="model.language_model.embed_tokens.weight",
        note="inferred; mergekit leaves out the language model when it writes",
    ),
    Architecture(
        "ViT, image classification",
        tf.ViTForImageClassification,
        tf.ViTConfig(**VISION),
        not_loaded="vit.layers.0.attention.q_proj.weight",
        note="inferred; mergekit leaves out the layers when it writes",
    ),
]
