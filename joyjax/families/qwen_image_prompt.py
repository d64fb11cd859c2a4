"""The chat templates of Qwen-Image, as token ids.

Source: pipeline_qwenimage.py, pipeline_qwenimage_edit.py and pipeline_qwenimage_edit_plus.py in Diffusers.
"""

from collections.abc import Sequence
from typing import Any

from joyjax.families.request import Request
from joyjax.processors.text import control_token, plain_tokens

SYSTEM = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:"
)
DROPPED = 34  # the system turn, and the <|im_start|> of the user's turn
EDIT_SYSTEM = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate."
)
EDIT_DROPPED = 64  # the system turn, and the begin of the user's turn up to the first picture
LONGEST_PROMPT = 512  # hidden states for the transformer; the first ones are kept


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Return the chat turns of a prompt. Control tokens are inserted by id; the prompt is always plain text."""
    turn = plain_tokens(tokenizer, "user\n" + prompt)  # as one text, like the reference
    return _turns(tokenizer, SYSTEM, turn)


def edit_prompt_tokens(tokenizer: Any, prompt: str, image_tokens: Sequence[int], numbered: bool) -> list[int]:
    """Return the chat turns of a prompt after pictures of `image_tokens` tokens each.

    `numbered`: "Picture 1: " stands before the first picture, and so on.
    """
    before, after = control_token(tokenizer, "<|vision_start|>"), control_token(tokenizer, "<|vision_end|>")
    image = control_token(tokenizer, "<|image_pad|>")
    turn, text = [], "user\n"
    for number, count in enumerate(image_tokens, 1):
        text += f"Picture {number}: " if numbered else ""
        turn += [*plain_tokens(tokenizer, text), before, *[image] * count, after]
        text = ""
    return _turns(tokenizer, EDIT_SYSTEM, [*turn, *plain_tokens(tokenizer, text + prompt)])


def _turns(tokenizer: Any, system: str, user: Sequence[int]) -> list[int]:
    """Return the turns of system and user, and the begin of the assistant's."""
    start, end = control_token(tokenizer, "<|im_start|>"), control_token(tokenizer, "<|im_end|>")
    line = plain_tokens(tokenizer, "\n")
    first = [start, *plain_tokens(tokenizer, system), end, *line]
    return [*first, start, *user, end, *line, start, *plain_tokens(tokenizer, "assistant\n")]


def prompt_rows(request: Request, tokenizer: Any) -> tuple[list[list[int]], tuple[str, ...]]:
    """Return the tokens of the negative prompt, with guidance only, and of the prompt; and notes for the user.

    Of a prompt only the first 512 tokens are used, as in the reference. The decoder is causal, so the rest is not
    computed.
    """
    rows, notes = [], []
    for name, prompt in request.prompts.items():
        tokens = prompt_tokens(tokenizer, prompt)
        over = len(tokens) - DROPPED - LONGEST_PROMPT
        if over > 0:
            notes.append(f"{name}: the model reads {LONGEST_PROMPT} tokens; the last {over} are not read")
        rows.append(tokens[: DROPPED + LONGEST_PROMPT])
    return rows, tuple(notes)
