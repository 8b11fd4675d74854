"""What all samples of a batch begin with goes through a model once; nothing but rounding may change by it."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

from examples.order_study.data.samples import NO_LOSS, Sample
from examples.order_study.errors import StudyError
from examples.order_study.measure.losses import sample_losses
from examples.order_study.shared import Aligned, response_logits, shared_prefix
from examples.order_study.train.trainer import reproducible

VOCABULARY = 50
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}
HEAD = [7, 3, 9, 9, 2]


def sample(prompt: list[int], response: list[int]) -> Sample:
    return {"input_ids": prompt + response, "labels": [NO_LOSS] * len(prompt) + response}


SAMPLES = [
    sample([*HEAD, 11, 12], [20, 21, 1]),
    sample([*HEAD, 13], [22, 1]),
    sample([*HEAD, 11, 14, 15, 16, 17], [1]),
    sample([*HEAD, 18, 19], [23, 24, 25, 26, 1]),
]


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_attention_heads=4, num_key_value_heads=2))


def gpt2() -> PreTrainedModel:  # positions are learned, so that a token moved by padding would be seen
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config)


@pytest.fixture(params=[llama, qwen2, gpt2], ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    torch.manual_seed(3)
    made: PreTrainedModel = request.param()
    made.eval()  # type: ignore[no-untyped-call]  # as transformers ships it
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)
    with reproducible(1):
        yield made


def alone(model: PreTrainedModel, one: Sample) -> torch.Tensor:
    """The loss of one sample, token by token, without padding or cache."""
    logits = model(torch.tensor([one["input_ids"]])).logits[0].log_softmax(dim=-1)
    places = [place for place, label in enumerate(one["labels"]) if label != NO_LOSS]
    return -torch.stack([logits[place - 1, one["labels"][place]] for place in places]).sum()


def test_the_prefix_ends_before_the_last_token_of_the_shortest_prompt() -> None:
    assert shared_prefix(SAMPLES) == HEAD
    assert shared_prefix([SAMPLES[0]]) == [*HEAD, 11]
    assert shared_prefix([SAMPLES[1], sample(HEAD, [13, 1])]) == HEAD[:-1]
    with pytest.raises(StudyError, match="these share none: leave the setting out"):
        shared_prefix([SAMPLES[0], sample([4, 5, 6], [1])])


def test_loss_and_gradient_are_those_of_the_samples_alone(model: PreTrainedModel) -> None:
    expected = torch.stack([alone(model, one) for one in SAMPLES]).sum()
    expected.backward()  # type: ignore[no-untyped-call]  # as torch ships it
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    batch = Aligned(HEAD)(SAMPLES)
    logits = response_logits(model, model, HEAD, batch)
    labels = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]  # as torch ships it
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prefix", [[], HEAD, HEAD[:2]], ids=len)
def test_measured_losses_and_answers_are_those_of_the_samples_alone(model: PreTrainedModel, prefix: list[int]) -> None:
    found = sample_losses([model], SAMPLES, 3, prefix)
    with torch.no_grad():
        expected = [float(alone(model, one)) for one in SAMPLES]
    assert found.total == pytest.approx(expected, rel=1e-5)
    assert list(found.tokens) == [3, 2, 1, 5]


def test_a_response_is_right_where_greedy_decoding_gives_it(model: PreTrainedModel) -> None:
    prompt = [*HEAD, 11]
    said = list(prompt)
    for _ in range(3):
        with torch.no_grad():
            said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
    wrong = [*said[:-1], (said[-1] + 1) % VOCABULARY]
    samples = [sample(prompt, said[len(prompt) :]), sample(prompt, wrong[len(prompt) :])]
    for prefix in ([], HEAD):
        assert sample_losses([model], samples, 2, prefix).right.tolist() == [True, False]  # type: ignore[union-attr]


@pytest.mark.parametrize("prefix", [[], HEAD], ids=len)
def test_an_ensemble_gives_each_token_the_mean_of_the_probabilities(prefix: list[int]) -> None:
    torch.manual_seed(0)
    models = [llama().eval() for _ in range(3)]  # type: ignore[no-untyped-call]  # as transformers ships it
    with torch.no_grad():
        for one in models:
            for parameter in one.parameters():
                parameter.mul_(8)
    found = sample_losses(models, SAMPLES, 2, prefix)
    for place, one in enumerate(SAMPLES):
        ids = torch.tensor([one["input_ids"]])
        with torch.no_grad():
            shares = torch.stack([model(ids).logits[0].double().softmax(dim=-1) for model in models]).mean(dim=0)
        responses = [index for index, label in enumerate(one["labels"]) if label != NO_LOSS]
        expected = -sum(float(shares[index - 1, one["labels"][index]].log()) for index in responses)
        assert found.total[place] == pytest.approx(expected, rel=1e-5)
        likeliest = [int(shares[index - 1].argmax()) == one["labels"][index] for index in responses]
        assert found.right is not None
        assert found.right[place] == all(likeliest)
    losses = [sample_losses([model], SAMPLES, 2, prefix).total for model in models]
    assert all(np.abs(one - other).max() > 0.1 for one, other in pairwise(losses))  # there is something to average
