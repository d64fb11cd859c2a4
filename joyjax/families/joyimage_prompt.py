"""The chat template of JoyImage, as token ids.

Source: pipeline_joyimage_edit.py in Diffusers.
"""

from collections.abc import Sequence
from typing import Any

from joyjax.errors import RequestError
from joyjax.families.request import Request
from joyjax.processors.text import control_token, plain_tokens

# The backslash and the n after the line break are two characters: a slip in the code that the model was trained with,
# kept since the model expects it.
SYSTEM = (
    "system\n \\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)
DROPPED = 34  # the system turn, and the <|im_start|> of the user's turn
LONGEST_TEXT = 2048 + DROPPED  # without pictures; the reference truncates longer prompts, joyjax refuses them
LONGEST_PROMPT = 4096  # hidden states for the transformer; the last ones are kept


def prompt_tokens(tokenizer: Any, prompt: str, image_tokens: Sequence[int]) -> list[int]:
    """Return the chat turns of a prompt after pictures of `image_tokens` tokens each.

    Control tokens are inserted by id; the prompt is always plain text.
    """
    start, end = control_token(tokenizer, "<|im_start|>"), control_token(tokenizer, "<|im_end|>")
    line = plain_tokens(tokenizer, "\n")
    ids = [start, *plain_tokens(tokenizer, SYSTEM), end, *line, start]
    if image_tokens:
        before, after = control_token(tokenizer, "<|vision_start|>"), control_token(tokenizer, "<|vision_end|>")
        image = control_token(tokenizer, "<|image_pad|>")
        ids += plain_tokens(tokenizer, "user\n")
        for count in image_tokens:
            ids += [before, *[image] * count, after]
        ids += plain_tokens(tokenizer, prompt)
    else:
        ids += plain_tokens(tokenizer, "user\n" + prompt)  # tokenized as one text, as in the reference
    return [*ids, end, *line, start, *plain_tokens(tokenizer, "assistant\n")]


def prompt_rows(request: Request, tokenizer: Any, image_tokens: Sequence[int]) -> list[list[int]]:
    """Return the tokens of the negative prompt, with guidance only, and of the prompt.

    Raises:
        RequestError: for a prompt that is too long. The reference truncates it.
    """
    rows = []
    for name, prompt in request.prompts.items():
        rows.append(prompt_tokens(tokenizer, prompt, image_tokens))
        over = len(rows[-1]) - sum(image_tokens) - LONGEST_TEXT
        if over > 0:
            raise RequestError(f"{name} is {over} tokens too long; with its template it may have {LONGEST_TEXT}")
    return rows
