"""Mistakes that are easily made when Qwen-Image-Layered is written anew, each made on purpose by patching joyjax.

As tests/qwen_traps.py, whose mistakes it shares; `tests/parity/test_layered_traps.py` runs a picture with each.
"""

import dataclasses
import math

import numpy as np
from PIL import Image
from traps import Trap, entering

from joyjax.families import qwen_image_layered_stages as stages
from joyjax.families import qwen_image_stages
from joyjax.media.image import as_rgba
from joyjax.models import qwen_image as transformer
from joyjax.models.qwen_image import QwenImageTransformer
from joyjax.runtime import result
from joyjax.sampling.guidance import Guidance

TRAPS: list[Trap] = []
trap = entering(TRAPS)


def condition_at(patch, item):
    patch.around(stages, "layer_positions", lambda right, size, layers: _with_item(right(size, layers), item(layers)))


def _with_item(positions, item):
    changed = positions.copy()
    changed[changed[:, 0] < 0, 0] = item
    return changed


@trap("transformer", "the condition is frame 0, for frame -1", "velocity")
def condition_is_frame_0(patch):
    condition_at(patch, lambda layers: 0)


@trap("transformer", "the condition is frame layers + 1, for frame -1", "velocity")
def condition_is_the_next_frame(patch):
    condition_at(patch, lambda layers: layers + 1)


@trap("transformer", "frames counted from 1, for 0", "velocity")
def frames_from_1(patch):
    def wrong(right, size, layers):
        found = right(size, layers)
        found[:, 0] += found[:, 0] >= 0
        return found

    patch.around(stages, "layer_positions", wrong)


@trap("transformer", "text not behind the layers + 1 frames of a small picture", "velocity of a small picture")
def text_start_of_sides_alone(patch):
    patch.around(stages, "text_start", lambda right, sizes, least: right(sizes))


@trap("transformer", "text behind layers, for layers + 1", "velocity of a small picture")
def text_start_one_early(patch):
    patch.around(stages, "text_start", lambda right, sizes, least: right(sizes, least - 1))


@trap("transformer", "the second row of the added time, for the first", "velocity")
def second_row_added(patch):
    def wrong(right, self, *inputs):
        added = self.time_added[...]
        return right(self, *inputs) - added[0] + added[1]

    patch.around(QwenImageTransformer, "_embed_time", wrong)


@trap("transformer", "no row added to the time", "velocity")
def nothing_added(patch):
    patch.around(
        QwenImageTransformer, "_embed_time", lambda right, self, *inputs: right(self, *inputs) - self.time_added[...][0]
    )


@trap("transformer", "the row added before the time's MLP, for after", "velocity")
def added_before_the_mlp(patch):
    def wrong(self, timestep):
        embedding = transformer.timestep_embedding(timestep, transformer.TIME_CHANNELS, scale=transformer.TIME_SCALE)
        return self.time_hidden(transformer.nnx.silu(self.time_in(embedding) + self.time_added[...][0]))

    patch.set(QwenImageTransformer, "_embed_time", wrong)


@trap("guidance", "norm restored without cfg_normalize", "latents")
def always_normalised(patch):
    patch.set(stages, "guidance", lambda parts, request: Guidance(norm=parts.configs["transformer"].in_channels))


@trap("schedule", "mu by the rule of text to image", "schedule")
def linear_mu(patch):
    def wrong(right, request, parts):
        plan = right(request, parts)
        return dataclasses.replace(plan, shift=parts.solver.shift(plan.lengths.target[0]))

    patch.around(stages, "plan", wrong)


@trap("schedule", "mu of the target's tokens, for the condition's", "schedule")
def mu_of_the_target(patch):
    def wrong(right, request, parts):
        plan = right(request, parts)
        return dataclasses.replace(plan, shift=math.sqrt(plan.lengths.target[0] / stages.SHIFT_TOKENS))

    patch.around(stages, "plan", wrong)


@trap("schedule", "mu without the square root", "schedule")
def mu_without_root(patch):
    def wrong(right, request, parts):
        plan = right(request, parts)
        return dataclasses.replace(plan, shift=plan.shift**2)

    patch.around(stages, "plan", wrong)


@trap("pixels", "alpha not premultiplied while the picture is scaled", "pixels")
def scaled_without_premultiplying(patch):
    def wrong(right, plan, parts):
        arrays, (height, width) = right(plan, parts), plan.size[1:]
        bands = [band.resize((width, height), Image.Resampling.LANCZOS) for band in plan.request.pictures[0].split()]
        pixels = np.asarray(Image.merge("RGBA", bands))[None]
        return dataclasses.replace(arrays, own=dataclasses.replace(arrays.own, pictures=(pixels,)))

    patch.around(stages, "prepare", wrong)


@trap("pixels", "the picture laid on black, for RGBA", "pixels")
def laid_on_black(patch):
    def wrong(right, plan, parts):
        black = Image.new("RGBA", plan.request.pictures[0].size, (0, 0, 0, 255))
        pictures = (Image.alpha_composite(black, as_rgba(plan.request.pictures[0])),)
        return right(dataclasses.replace(plan, request=dataclasses.replace(plan.request, pictures=pictures)), parts)

    patch.around(stages, "prepare", wrong)


@trap("layers", "frame 0 returned, for the frames from 1 on", "layers")
def frame_0_returned(patch):
    def wrong(right, networks, latents, plan, events):
        frame = plan.lengths.references[0]
        return right(networks, np.concatenate([latents[:, :frame], latents], axis=1), plan, events)

    patch.around(stages, "finish", wrong)


@trap("layers", "layers top first, for bottom first", "layers")
def top_first(patch):
    def wrong(right, *inputs):
        media = right(*inputs)
        return dataclasses.replace(media, pixels=media.pixels[::-1])

    patch.around(stages, "finish", wrong)


@trap("layers", "colours premultiplied with alpha, for as decoded", "layers")
def premultiplied(patch):
    def wrong(right, *inputs):
        media = right(*inputs)
        colours = media.pixels[..., :3] * (media.pixels[..., 3:] / 255)
        pixels = np.concatenate([np.round(colours).astype(np.uint8), media.pixels[..., 3:]], axis=-1)
        return dataclasses.replace(media, pixels=pixels)

    patch.around(stages, "finish", wrong)


@trap("layers", "the composite is the bottom layer", "composite")
def composite_is_the_bottom(patch):
    patch.set(result, "shown", lambda media: result.from_pixels(media.pixels[0]))


@trap("prompt", "33 tokens dropped, for 34", "velocity")
def drop_33(patch):
    patch.set(stages, "DROPPED", 33)
    patch.set(qwen_image_stages, "DROPPED", 33)
