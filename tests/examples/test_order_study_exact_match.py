"""The number an answer comes to, the answers a model gives, and its loss on each sample."""

import math
from collections.abc import Iterator
from decimal import Decimal

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.order_study.data.parts import Example
from examples.order_study.data.samples import encode_part
from examples.order_study.errors import StudyError
from examples.order_study.measure.answers import answers, exact, final_number, prompt_of, right_numbers
from examples.order_study.measure.losses import batches, sample_losses
from examples.order_study.settings import Architecture
from examples.order_study.train.trainer import fresh_model, reproducible
from examples.quickstart.train import train_tokenizer

CONTEXT = 40
TEXTS = ["one", "a second prompt", "Q: 3 + 4?", "x", "", "something longer than the rest", "y", "ten"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("48/2 = <<48/2=24>>24 clips in May.\n#### 72", "72"),
        ("####72", "72"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### $-5", "-5"),
        ("#### -$5", "-5"),
        ("#### \u22125", "-5"),
        ("#### .5", "0.5"),
        ("#### 72.", "72"),
        ("#### 72.0", "72"),
        ("#### 072", "72"),
        ("#### -0", "0"),
        ("#### 5 apples of 7", "5"),
        ("#### 72\n\nQuestion: Ann has 3 apples.\n#### 3", "72"),
        ("The answer is 72.", "72"),
        ("It costs $1,234.50.", "1234.5"),
        ("Of 5 apples, 3 are left", "3"),
        ("10-3", "3"),
        ("a 5-3 win", "3"),
        ("(4)-3", "3"),
        ("it is -3 degrees", "-3"),
        ("=-3", "-3"),
        ("1,2", "2"),
        ("1,2345", "2345"),
        ("12,345,67", "67"),
        ("version 1.2.3", "3"),
        ("72%", "72"),
        ("3/4", "4"),
        ("the 3rd", "3"),
        ("99999999999999999999.01", "99999999999999999999.01"),
    ],
)
def test_final_number(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number", "#### none", "12 and more\n#### none", "####\n72", "$", "-", "."])
def test_a_text_without_a_number_has_none(text: str) -> None:
    assert final_number(text) is None


def test_exact_compares_numbers_not_words() -> None:
    right = right_numbers(["#### 72", "5 and 3", "#### 1,000"])
    assert right == [72, 3, 1000]
    assert exact(["it is 72.0", "3", "1000 apples"], right) == [True, True, True]
    assert exact(["#### 27", "none", ""], right) == [False, False, False]


def test_a_response_without_a_number_is_refused() -> None:
    with pytest.raises(StudyError) as caught:
        right_numbers(["#### 1", "no number here"])
    assert str(caught.value) == (
        "exact match compares final numbers, but the response 'no number here' of the held-out part has none: leave "
        "measuring.exact_match out for this data"
    )


# Models


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 300, CONTEXT)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedModel]:
    architecture = Architecture(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
    )
    made = fresh_model(architecture, tokenizer, 3)
    made.eval()  # type: ignore[no-untyped-call]  # as transformers ships it
    with torch.no_grad():
        for parameter in made.parameters():  # far from uniform, so that no two tokens are nearly alike
            parameter.mul_(4)
    with reproducible(1):
        yield made


def greedy(model: PreTrainedModel, prompt: list[int], end: int, limit: int) -> list[int]:
    """One token at a time, without padding, cache or library."""
    ids = list(prompt)
    while len(ids) < min(CONTEXT, len(prompt) + limit):
        with torch.no_grad():
            following = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(following)
        if following == end:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("limit", [1, 25])
def test_answers_are_those_of_each_prompt_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, limit: int
) -> None:
    prompts = [
        prompt_of(sample)
        for sample in encode_part("held_out", [Example(t, "1") for t in TEXTS], tokenizer, CONTEXT).samples
    ]
    assert prompts == [tokenizer(text)["input_ids"] for text in TEXTS]
    end = tokenizer.eos_token_id
    expected = [tokenizer.decode(greedy(model, p, end, limit), skip_special_tokens=True) for p in prompts]
    assert answers(model, tokenizer, prompts, limit, CONTEXT, batch_size) == expected


def test_answers_stop_at_the_end_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tokenizer("one")["input_ids"]
    said = greedy(model, prompt, -1, 8)
    assert len(set(said)) > 1
    place = next(index for index, token in enumerate(said) if token != said[0])
    ending = train_tokenizer(TEXTS, 300, CONTEXT)
    ending.eos_token = ending.convert_ids_to_tokens(said[place])
    (answer,) = answers(model, ending, [prompt], 8, CONTEXT, 4)
    assert answer == tokenizer.decode(said[:place])


def test_a_prompt_that_fills_the_context_has_no_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [[5] * CONTEXT, [5] * (CONTEXT - 1)]
    first, second = answers(model, tokenizer, prompts, 10, CONTEXT, 2)
    assert first == ""
    assert second == tokenizer.decode(greedy(model, prompts[1], -1, 1), skip_special_tokens=True)


def test_a_model_that_samples_by_itself_answers_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = answers(model, tokenizer, prompts, 10, CONTEXT, 4)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 5.0)
    assert answers(model, tokenizer, prompts, 10, CONTEXT, 4) == expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_are_those_of_each_sample_alone_over_its_response(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    examples = [Example(prompt, f" {number * 'yes '}{number}") for number, prompt in enumerate(TEXTS, start=1)]
    losses = sample_losses([model], encode_part("held_out", examples, tokenizer, 10_000).samples, batch_size)
    for index, example in enumerate(examples):
        prompt = tokenizer(example.prompt)["input_ids"]
        response = [*tokenizer(example.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].double()
        total = 0.0
        for place, token in enumerate(response, start=len(prompt)):
            total -= math.log(torch.softmax(logits[place - 1], dim=0)[token])
        assert losses.tokens[index] == len(response)
        assert losses.total[index] == pytest.approx(total, rel=1e-5)


def test_losses_repeat_bit_for_bit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    samples = encode_part("held_out", [Example("", text + " and so on") for text in TEXTS], tokenizer, CONTEXT).samples
    one, other = sample_losses([model], samples, 3), sample_losses([model], samples, 3)
    assert np.array_equal(one.total.view(np.int64), other.total.view(np.int64))
    assert list(one.tokens) == [len(sample["input_ids"]) - 1 for sample in samples]  # the start token is given


def test_batches_hold_every_sample_once_shortest_first() -> None:
    assert list(batches([5, 1, 4, 1, 3], 2)) == [[1, 3], [4, 2], [0]]
    assert list(batches([], 2)) == []
