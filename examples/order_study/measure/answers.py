"""The answers a model gives, and whether they come to the right number."""

import re
from collections.abc import Sequence
from decimal import Decimal

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from examples.order_study.data.samples import Sample, prompt_length
from examples.order_study.errors import StudyError
from examples.order_study.measure.losses import batches

MARK = "####"  # stands before the final number in GSM8K's answers

_NUMBER = re.compile(
    # A minus is a sign only where it joins nothing: 10-3 ends with 3, and so does a 5-3 win.
    r"(?P<sign>(?<![\w)])[-\u2212])?(?:\$\s?(?P<inner>[-\u2212])?)?"
    # Commas belong to a number where they cut it into thousands: 1,234 is one number, 1,2 are two.
    r"(?P<value>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
)


def final_number(text: str) -> Decimal | None:
    """The number after the first `####` of a text, or its last number where it has no such mark.

    The first mark counts, since a model that does not stop after its answer goes on with another question.
    Equal numbers are equal however they are written: 72, $72, 72.0 and `72.` at the end of a sentence.
    """
    before, mark, after = text.partition(MARK)
    numbers = list(_NUMBER.finditer(after.split("\n")[0] if mark else before))
    if not numbers:
        return None
    match = numbers[0] if mark else numbers[-1]
    value = Decimal(match["value"].replace(",", ""))
    return -value if match["sign"] or match["inner"] else value


def right_numbers(responses: Sequence[str]) -> list[Decimal]:
    """The final number of each response of the data.

    Raises:
        StudyError: A response has none.
    """
    numbers: list[Decimal] = []
    for response in responses:
        number = final_number(response)
        if number is None:
            raise StudyError(
                f"exact match compares final numbers, but the response {response[:60]!r} of the held-out part has "
                "none: leave measuring.exact_match out for this data"
            )
        numbers.append(number)
    return numbers


def exact(answers: Sequence[str], right: Sequence[Decimal]) -> list[bool]:
    """Whether each answer comes to the right number; one without a number is wrong."""
    return [final_number(answer) == number for answer, number in zip(answers, right, strict=True)]


def prompt_of(sample: Sample) -> list[int]:
    """The tokens of a sample before its response: the first at least, since none is predicted from nothing."""
    return sample["input_ids"][: max(1, prompt_length(sample))]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    context: int,
    batch_size: int,
) -> list[str]:
    """Generate greedily after each prompt, up to the end token.

    An answer ends unfinished at `max_new_tokens`, or where prompt and answer together fill the context, whichever
    comes first; which that is depends on its own prompt alone, not on the others of its batch.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer; the end token is the one that training put after each response.
        prompts: Token ids; those left to the longest must be fewer than the context holds.
        max_new_tokens: Limit of an answer.
        context: How many tokens the model can see.
        batch_size: How many are generated at a time.

    Returns:
        The text of each answer, in the order of `prompts`.
    """
    room = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    texts = [""] * len(prompts)
    for limit in sorted(set(room)):
        chosen = [index for index in range(len(prompts)) if room[index] == limit]
        for batch in batches([len(prompts[index]) for index in chosen], batch_size):
            indices = [chosen[place] for place in batch]
            generated = _generate(model, tokenizer, [prompts[index] for index in indices], limit)
            for index, text in zip(indices, generated, strict=True):
                texts[index] = text
    return texts


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], limit: int
) -> list[str]:
    if limit < 1:
        return [""] * len(prompts)
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)  # on the left: the answer follows the prompt
        mask[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]  # as transformers ships it
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            # Our own, whole: a checkpoint's may sample, and a merge has none.
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]  # as transformers ships it
                max_new_tokens=limit,
                do_sample=False,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            ),
        )
    # Cut here: not every tokenizer counts its end token among the special ones that decoding skips.
    end = tokenizer.eos_token_id
    tokens = [row[: row.index(end)] if end in row else row for row in out[:, longest:].tolist()]
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts
