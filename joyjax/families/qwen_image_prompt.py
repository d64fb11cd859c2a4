"""The chat template of Qwen-Image, as token ids.

Source: pipeline_qwenimage.py in Diffusers.
"""

from typing import Any

from joyjax.families.request import Request
from joyjax.processors.text import control_token, plain_tokens

SYSTEM = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:"
)
DROPPED = 34  # the system turn, and the <|im_start|> of the user's turn
LONGEST_PROMPT = 512  # hidden states for the transformer; the first ones are kept


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Return the chat turns of a prompt. Control tokens are inserted by id; the prompt is always plain text."""
    start, end = control_token(tokenizer, "<|im_start|>"), control_token(tokenizer, "<|im_end|>")
    line = plain_tokens(tokenizer, "\n")
    system = [start, *plain_tokens(tokenizer, SYSTEM), end, *line]
    turn = plain_tokens(tokenizer, "user\n" + prompt)  # as one text, like the reference
    user = [start, *turn, end, *line]
    return [*system, *user, start, *plain_tokens(tokenizer, "assistant\n")]


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
