"""Mistakes that are easily made when Qwen-Image's edits are written anew, each made on purpose by patching joyjax.

As tests/traps.py, which has what all families share; `tests/parity/test_qwen_edit_traps.py` runs an edit with each.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import qwen_traps
import traps
from pairs import photo
from PIL import Image, ImageOps
from traps import Trap, acting_tokens, entering

from joyjax.families import qwen_image_edit_stages as stages
from joyjax.families import qwen_image_prompt
from joyjax.models import qwen2_5_vl_vision as tower
from joyjax.models.qwen2_5_vl_vision import VisionBlock, VisionTower
from joyjax.processors import qwen_vl, vision

PICTURES = photo(131, 91, seed=1), photo(70, 103)  # of the edit that is run with each mistake

TRAPS: list[Trap] = []
trap = entering(TRAPS)


# The vision tower


@trap("vision tower", "tokens left in the order of windows, for put back into rows", "vision tokens")
def windows_not_put_back(patch):
    def wrong(right, x, index):
        if x.ndim == 3:  # tokens; keys and values have heads
            rows = [np.unique(row) for row in np.asarray(index)]
            index = jnp.stack([jnp.pad(row, (0, index.shape[1] - len(row))) for row in rows])
        return right(x, index)

    patch.around(tower, "_pick", wrong)


def around_full_layers(patch, change):
    def wrong(right, self, inputs):
        config = self.config
        vars(self)["config"] = dataclasses.replace(config, fullatt_block_indexes=change(config))
        return right(self, inputs)

    patch.around(VisionTower, "__call__", wrong)


@trap("vision tower", "full layers one too early, as if counted from 1", "vision tokens")
def full_layers_early(patch):
    around_full_layers(patch, lambda config: tuple(layer - 1 for layer in config.fullatt_block_indexes))


@trap("vision tower", "all layers attend to the whole picture", "vision tokens")
def no_windows(patch):
    around_full_layers(patch, lambda config: tuple(range(config.depth)))


@trap("vision tower", "windows run on from one into the next, and across pictures", "vision tokens")
def windows_across_pictures(patch):
    def wrong(right, inputs):
        attend, half = right(inputs), inputs.patches.shape[1] // inputs.window_lengths.shape[1] // 2

        def across(*heads):
            flat = [jnp.roll(x.reshape(-1, *x.shape[2:]), half, axis=0).reshape(x.shape) for x in heads]
            found = attend(*flat)
            return jnp.roll(found.reshape(-1, *found.shape[2:]), -half, axis=0).reshape(found.shape)

        return across

    patch.around(tower, "attend_in_windows", wrong)


@trap("vision tower", "pictures attend to each other in the full layers", "vision tokens")
def pictures_see_each_other(patch):
    def wrong(right, inputs, merged):
        attend = right(inputs, merged)
        return lambda query, key, value: attend(query, key[::-1], value[::-1])

    patch.around(tower, "attend_in_pictures", wrong)


@trap("vision tower", "padding of the smaller windows at the edge attended to", "vision tokens")
def padded_windows(patch):
    def wrong(right, inputs):
        full = inputs.patches.shape[1] // inputs.window_lengths.shape[1]
        return right(dataclasses.replace(inputs, window_lengths=jnp.full_like(inputs.window_lengths, full)))

    patch.around(tower, "attend_in_windows", wrong)


@trap("vision tower", "windows of 8 × 8 tokens, for 4 × 4: 112 pixels over the patch's 14 alone", "vision tokens")
def large_windows(patch):
    patch.set(tower.VisionConfig, "window", property(lambda self: self.window_size // self.patch_size))


@trap("vision tower", "RoPE's axes are column, row, for row, column", "vision tokens")
def column_first(patch):
    patch.around(
        tower, "rotation_by_blocks", lambda right, positions, *how: right(positions[..., np.array([1, 0])], *how)
    )


@trap("vision tower", "RoPE's positions those of merged tokens, for patches", "vision tokens")
def merged_positions(patch):
    patch.around(tower, "rotation_by_blocks", lambda right, positions, *how: right(positions // 2, *how))


@trap("vision tower", "the MLPs' SiLU on the other map", "vision tokens")
def gates_swapped(patch):
    patch.set(VisionBlock, "mlp", lambda self, x: self.down(tower.swiglu(self.up(x), self.gate(x))))


@trap("vision tower", "the merger's GELU tanh, for exact", "vision merger")
def merger_gelu_tanh(patch):
    patch.around(tower, "gelu", lambda right, x, approximate: right(x, approximate=True))


@trap("vision tower", "patches row by row, for block by block", "vision patches")
def patches_in_rows(patch):
    def wrong(right, picture, processor):
        patches, (rows, columns) = right(picture, processor)
        blocks = patches.reshape(rows // 2, columns // 2, 2, 2, -1)
        return blocks.swapaxes(1, 2).reshape(patches.shape), (rows, columns)

    patch.around(qwen_vl, "vision_patches", wrong)


# The text encoder


trap("text encoder", "key head j for query heads j, j + K, …, for neighbours", "hidden states")(
    traps.key_heads_by_turns
)
trap("text encoder", "frequencies dealt to the three axes in turn, for in chunks", "hidden states")(
    qwen_traps.mrope_in_turn
)
trap("text encoder", "text after a picture goes on at p + count, for p + max(rows, columns)", "hidden states")(
    traps.text_after_every_patch
)


@trap("text encoder", "positions of one axis, as Diffusers 0.42.1 with Transformers 5", "hidden states")
def positions_of_one_axis(patch):
    def wrong(right, ids, *inputs):
        return np.repeat(np.arange(len(ids), dtype=np.int32)[:, None], 3, axis=1)

    patch.around(qwen_vl, "multimodal_positions", wrong)


trap("text encoder", "hidden states before the final norm, for after", "hidden states")(
    qwen_traps.before_the_final_norm
)


# The transformer


def around_positions(patch, change):
    def wrong(right, sizes):
        positions = right(sizes)
        first = sizes[0][0] * sizes[0][1]
        return change(positions, np.arange(len(positions)) >= first)

    patch.around(stages, "image_positions", wrong)


@trap("transformer", "all references in one frame, for one each", "velocity")
def references_in_one_frame(patch):
    def change(positions, reference):
        positions[reference, 0] = 1
        return positions

    around_positions(patch, change)


@trap("transformer", "references in the target's frame", "velocity")
def references_in_the_targets_frame(patch):
    def change(positions, reference):
        positions[reference, 0] = 0
        return positions

    around_positions(patch, change)


@trap("transformer", "references counted from their corner, for the middle", "velocity")
def references_from_the_corner(patch):
    def change(positions, reference):
        for item in np.unique(positions[reference, 0]):
            own = positions[:, 0] == item
            positions[own, 1:] -= positions[own, 1:].min(axis=0)
        return positions

    around_positions(patch, change)


def small_result(patch):
    patch.set(stages, "natural_size", lambda reference, base_size: (64, 96))


@trap(
    "transformer",
    "text starts after the target alone, for after the largest picture",
    "velocity",
    given=small_result,
)
def text_after_the_target(patch):
    patch.around(stages, "text_start", lambda right, sizes: right(sizes[:1]))


@trap("transformer", "padding of the references attended to", "velocity")
def padded_references(patch):
    patch.around(
        stages, "condition", lambda right, *inputs: dataclasses.replace(right(*inputs), reference_lengths=None)
    )


# Prompts


@trap("prompt", "63 tokens dropped, for 64", "velocity")
def drop_63(patch):
    patch.set(stages, "EDIT_DROPPED", 63)


@trap("prompt", "pictures without their numbers", "token ids")
def no_numbers(patch):
    patch.around(stages, "edit_prompt_tokens", lambda right, *inputs, numbered: right(*inputs, numbered=False))


@trap("prompt", "text to image's description of the task", "token ids")
def other_system(patch):
    patch.set(qwen_image_prompt, "EDIT_SYSTEM", qwen_image_prompt.SYSTEM)


@trap("prompt", "a line break between picture and prompt", "token ids")
def line_break_before_the_prompt(patch):
    patch.around(
        stages,
        "edit_prompt_tokens",
        lambda right, tokenizer, prompt, *inputs, **how: right(tokenizer, "\n" + prompt, *inputs, **how),
    )


@trap("prompt", "control tokens in a prompt act", "token ids")
def control_tokens_act(patch):
    patch.set(qwen_image_prompt, "plain_tokens", acting_tokens)


# Pictures


@trap("pictures", "scaled bicubically, for by Lanczos", "pixels")
def bicubic(patch):
    patch.set(stages, "stretch", lambda image, size: image.resize(size[::-1], Image.Resampling.BICUBIC))


@trap("pictures", "shape kept and the rest cropped, for stretched", "pixels")
def cropped(patch):
    patch.set(stages, "stretch", lambda image, size: ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS))


@trap("pictures", "sides rounded down to 32, for to the nearest", "size")
def sides_rounded_down(patch):
    def wrong(right, picture, side):
        ratio = picture[1] / picture[0]
        width = (side**2 * ratio) ** 0.5
        return int(width / ratio) // 32 * 32, int(width) // 32 * 32

    patch.around(stages, "size_of_area", wrong)


@trap("pictures", "height of the rounded width, for of the exact one", "sizes")
def height_of_the_rounded_width(patch):
    def wrong(right, picture, side):
        width = right(picture, side)[1]
        return round(width * picture[0] / picture[1] / 32) * 32, width

    patch.around(stages, "size_of_area", wrong)


@trap("pictures", "the text encoder shown what the autoencoder is", "vision patches")
def one_size_for_both(patch):
    patch.set(stages, "read_side", lambda base_size, plus: base_size)


@trap("pictures", "for the text encoder scaled from the autoencoder's, for from the original", "vision patches")
def scaled_twice(patch):
    def wrong(right, pictures, *inputs):
        sizes = [picture.size for picture in pictures]
        large = [picture.resize((256, 256), Image.Resampling.LANCZOS) for picture in pictures]
        again = [picture.resize(size, Image.Resampling.LANCZOS) for picture, size in zip(large, sizes, strict=True)]
        return right(again, *inputs)

    patch.around(stages, "windowed_inputs", wrong)


@trap("pictures", "the vision tower's second resizing left out", "vision patches")
def no_second_resizing(patch):
    def wrong(right, height, width, factor, *bounds):
        return height // factor * factor, width // factor * factor

    patch.around(vision, "smart_resize", wrong)
    patch.around(qwen_vl, "smart_resize", wrong)


@trap("pictures", "size from the first reference, for the last", "size")
def size_of_the_first(patch):
    first = PICTURES[0].height, PICTURES[0].width
    patch.around(stages, "natural_size", lambda right, reference, base_size: right(first, base_size))


trap("autoencoder", "a sample of the posterior, for its mode", "reference latents")(traps.posterior_sampled)
trap("autoencoder", "reference latents not normalised", "reference latents")(traps.latents_not_normalised)
