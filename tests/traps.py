"""Mistakes that are easily made when this model is written anew, each made on purpose by patching joyjax.

`tests/parity/test_traps.py` runs an edit with each of them and asserts that the tests would notice. A trap is a function
that patches; around it stand what is wrong, in words, and the stage of the edit at which it is measured.
"""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from joyjax import editing
from joyjax.convert import joyimage as joyimage_keys
from joyjax.convert import wan_vae as wan_vae_keys
from joyjax.convert.rules import last_frame, patch_in, split_out
from joyjax.families import joyimage as family
from joyjax.inputs import image, text, vision
from joyjax.kernels import modulate, qk_norm_rope
from joyjax.kernels.attention import attention
from joyjax.kernels.modulate import layer_norm
from joyjax.kernels.qk_norm_rope import norm_rope
from joyjax.layers.conv import Conv
from joyjax.layers.embed import timestep_embedding
from joyjax.layers.norm import ChannelNorm, rms_norm
from joyjax.layers.rope import rotate_half_split, rotation_by_blocks
from joyjax.models import joyimage, qwen3_vl, qwen3_vl_vision, wan_vae
from joyjax.models.joyimage import JoyImageTransformer, Stream
from joyjax.models.qwen3_vl import LanguageModel, TextConfig
from joyjax.models.qwen3_vl_vision import Merger, VisionBlock, gelu, place_patches
from joyjax.models.wan_vae import ResBlock, Upsample, WanVAE
from joyjax.sampling import steps
from joyjax.sampling.guidance import guide
from PIL import Image

Patch = Callable[[Any, str, Any], None]  # monkeypatch.setattr: where, name, what instead


@dataclasses.dataclass(frozen=True)
class Trap:
    """A mistake. `given` patches both sides of the comparison; `reload`: it is made while the checkpoint is read."""

    part: str
    mistake: str
    stage: str
    patch: Callable[[Patch], None]
    given: Callable[[Patch], None] | None = None
    reload: bool = False


TRAPS: list[Trap] = []


def trap(part: str, mistake: str, stage: str, **options: Any) -> Callable[[Callable], Callable]:
    """Enter a function into the table."""

    def enter(patch: Callable) -> Callable:
        TRAPS.append(Trap(part, mistake, stage, patch, **options))
        return patch

    return enter


# The transformer


@trap("transformer", "RoPE's theta 256, the default of the class, for 10000", "velocity")
def theta_of_the_class(patch):
    patch(joyimage, "rotation_by_blocks", lambda positions, channels, theta: rotation_by_blocks(positions, channels, 256.0))


def with_norm_rope(patch, function):
    patch(qk_norm_rope, "norm_rope", function)
    patch(joyimage, "norm_rope", function)


@trap("transformer", "RoPE pairs channels i and i + H/2, for 2i and 2i + 1", "velocity")
def half_split(patch):
    def half_split(x, scale, rotation):
        y = norm_rope(x, scale, None)
        return y if rotation is None else rotate_half_split(y, rotation)

    with_norm_rope(patch, lambda x, scale, rotation, eps=1e-6: half_split(x, scale, rotation))


@trap("transformer", "queries and keys normalised after RoPE", "velocity")
def norm_after_rope(patch):
    def rotated_first(x, scale, rotation):
        rotated = norm_rope(x, jnp.ones_like(scale), rotation)  # the norm does not depend on the rotation, the scale does
        return norm_rope(rotated, scale, None)

    with_norm_rope(patch, lambda x, scale, rotation, eps=1e-6: rotated_first(x, scale, rotation))


@trap("transformer", "RoPE's first axis is the column, for the item", "velocity")
def column_first(patch):
    flipped = lambda positions, channels, theta: rotation_by_blocks(positions[..., ::-1], channels, theta)
    patch(joyimage, "rotation_by_blocks", flipped)


@trap("transformer", "items numbered as Diffusers is given them, the target last, for first", "velocity")
def target_last(patch):
    right = family._grid
    patch(family, "_grid", lambda item, rows, columns: right((item - 1) % 3, rows, columns))


@trap("transformer", "references not numbered: every item at time 0", "velocity")
def items_not_numbered(patch):
    right = family._grid
    patch(family, "_grid", lambda item, rows, columns: right(0, rows, columns))


def rotate_text(patch, offset=0):
    """Have RoPE for text, as `rope_type` mrope has it; with an offset, in the wrong place."""
    right = JoyImageTransformer._layout

    def layout(self, condition, targets):
        start = jnp.max(condition.positions, axis=(1, 2)) + 1 + offset
        positions = start[:, None, None] + jnp.arange(condition.txt.shape[1], dtype=start.dtype)[:, None]
        rotation = rotation_by_blocks(jnp.tile(positions, 3), self.config.rope_dim_list, self.config.theta)
        return dataclasses.replace(right(self, condition, targets), txt_rotation=rotation)

    patch(JoyImageTransformer, "_layout", layout)


@trap("transformer", "text rotated although rope_type is rope", "velocity")
def text_rotated(patch):
    rotate_text(patch)


@trap("transformer", "rope_type mrope: text starts at the largest image index, for one beyond", "velocity", given=rotate_text)
def mrope_starts_early(patch):
    rotate_text(patch, offset=-1)


@trap("transformer", "time embedding [sin, cos], for [cos, sin]", "velocity")
def sine_first(patch):
    swapped = lambda time, channels: jnp.roll(timestep_embedding(time, channels), channels // 2, axis=-1)
    patch(joyimage, "timestep_embedding", swapped)


@trap("transformer", "no SiLU between time embedding and time projection", "velocity")
def no_silu(patch):
    def embed(self, time):
        embedding = timestep_embedding(time, joyimage.TIME_CHANNELS)
        return self.time_out(self.time_hidden(nnx.silu(self.time_in(embedding))))

    patch(JoyImageTransformer, "_embed_time", embed)


@trap("transformer", "modulation read as scale, shift, gate, for shift, scale, gate", "velocity")
def scale_first(patch):
    right = Stream.modulation
    patch(Stream, "modulation", lambda self, temb: [right(self, temb)[n] for n in (1, 0, 2, 4, 3, 5)])


@trap("transformer", "modulation of the MLP first, for that of the attention", "velocity")
def mlp_modulation_first(patch):
    right = Stream.modulation
    patch(Stream, "modulation", lambda self, temb: [right(self, temb)[n] for n in (3, 4, 5, 0, 1, 2)])


@trap("transformer", "norm scaled by scale, for 1 + scale", "velocity")
def scale_without_one(patch):
    right = modulate._modulated
    patch(modulate, "_modulated", lambda x, scale, shift, eps: right(x, scale - 1, shift, eps))


@trap("transformer", "head modulated, as in Flux, for a plain norm", "velocity")
def modulated_head(patch):
    right, seen = JoyImageTransformer._embed_time, {}

    def embed(self, time):
        seen["temb"] = right(self, time)
        return seen["temb"]

    patch(JoyImageTransformer, "_embed_time", embed)
    patch(joyimage, "layer_norm", lambda x: layer_norm(x) * (1 + seen["temb"][:, None, 1]) + seen["temb"][:, None, 0])


@trap("transformer", "queries, keys and values apart within each head, for one after the other", "velocity", reload=True)
def qkv_by_head(patch):
    def by_head(x, shape):  # [(N 3 H), D], time_proj left as it is
        if len(shape) < 4:
            return split_out.forward(x, shape)
        return rearrange(x, "(n c h) d -> d c n h", c=shape[1], n=shape[2])

    patch(joyimage_keys, "split_out", dataclasses.replace(split_out, forward=by_head))


@trap("transformer", "patches flattened channel last into img_in, for channel first", "velocity", reload=True)
def patches_in_channel_last(patch):
    channel_first = lambda x, shape: x.reshape(len(x), -1).T  # the kernel's order kept where the tokens are channel-last
    patch(joyimage_keys, "patch_in", lambda *size: dataclasses.replace(patch_in(*size), forward=channel_first))


@trap("transformer", "patches unfolded channel first from proj_out, for channel last", "velocity")
def patches_out_channel_first(patch):
    right = JoyImageTransformer.__call__
    unfold = lambda tokens: rearrange(tokens, "b t (c q r) -> b t (q r c)", q=2, r=2)
    patch(JoyImageTransformer, "__call__", lambda self, *inputs: unfold(right(self, *inputs)))


@trap("transformer", "padding of the shorter prompt attended to", "velocity")
def padding_attended_to(patch):
    right = JoyImageTransformer._layout
    everything = lambda self, *inputs: dataclasses.replace(right(self, *inputs), lengths=None)
    patch(JoyImageTransformer, "_layout", everything)


@trap("transformer", "the text's GELU exact, for tanh", "velocity")
def text_gelu_exact(patch):
    right = nnx.gelu
    patch(joyimage.nnx, "gelu", lambda x, approximate: right(x, approximate=False))


# Guidance and schedule


@trap("guidance", "conditional + g·(conditional − unconditional), for unconditional + …", "latents")
def guided_from_conditional(patch):
    patch(steps, "guide", lambda c, u, scale, channels: guide(c, u, scale + 1, channels))


@trap("guidance", "the two rows swapped", "latents")
def guidance_rows_swapped(patch):
    patch(steps, "guide", lambda c, u, scale, channels: guide(u, c, scale, channels))


@trap("guidance", "norm not restored", "latents")
def norm_not_restored(patch):
    patch(steps, "guide", lambda c, u, scale, channels: u + scale * (c - u))


@trap("guidance", "norm restored for each token, for each latent pixel", "latents")
def norm_of_tokens(patch):
    patch(steps, "guide", lambda c, u, scale, channels: guide(c, u, scale, c.shape[-1]))


@trap("schedule", "lowest sigma shifted once, for twice", "schedule")
def lowest_sigma_shifted_once(patch):
    def shifted_once(count, config):
        levels = np.linspace(1, 1 / config.num_train_timesteps, count)
        levels = config.shift * levels / (1 + (config.shift - 1) * levels)
        return np.append(levels, 0).astype(np.float32)

    patch(editing, "sigmas", shifted_once)


@trap("schedule", "time told as sigma, for 1000·sigma", "latents")
def time_is_sigma(patch):
    patch(editing, "timesteps", lambda levels, config: levels)


# The autoencoder


@trap("autoencoder", "norm with an epsilon beside the mean square, for an L2 norm", "norm of small numbers")
def norm_with_epsilon(patch):
    patch(ChannelNorm, "__call__", lambda self, x: rms_norm(x, self.scale[...], 1e-6).astype(x.dtype))


@trap("autoencoder", "downsampling pads top and left, for bottom and right", "reference latents", reload=True)
def padded_top_left(patch):
    padding = ((1, 0), (1, 0))
    patch(wan_vae, "downsample", lambda width, **how: Conv(width, width, 3, stride=2, padding=padding, **how))


@trap("autoencoder", "first temporal slice of the causal kernels, for the last", "reference latents", reload=True)
def first_temporal_slice(patch):
    first = lambda x, shape: x[:, :, 0].transpose(2, 3, 1, 0)
    patch(wan_vae_keys, "last_frame", lambda frames: dataclasses.replace(last_frame(frames), forward=first))


@trap("autoencoder", "shortcut of the normalised input, for the raw one", "reference latents")
def shortcut_normalised(patch):
    right = ResBlock.__call__

    def call(self, x):
        normed = self.norm1(x)
        if self.shortcut is None:
            return right(self, x) - x + normed
        return right(self, x) - self.shortcut(x) + self.shortcut(normed)

    patch(ResBlock, "__call__", call)


@trap("autoencoder", "bilinear upsampling, for nearest", "decoded")
def bilinear_upsampling(patch):
    def call(self, x):
        b, h, w, c = x.shape
        return self.conv(jax.image.resize(x, (b, 2 * h, 2 * w, c), "bilinear"))

    patch(Upsample, "__call__", call)


def statistics(vae):
    return (jnp.array(numbers, jnp.float32) for numbers in (vae.config.latents_mean, vae.config.latents_std))


@trap("autoencoder", "reference latents not normalised", "reference latents")
def latents_not_normalised(patch):
    right = WanVAE.encode

    def encode(self, pixels):
        mean, std = statistics(self)
        return right(self, pixels) * std + mean

    patch(WanVAE, "encode", encode)


@trap("autoencoder", "latents decoded as they are, not brought back from their statistics", "decoded")
def latents_not_brought_back(patch):
    right = WanVAE.decode

    def decode(self, latents):
        mean, std = statistics(self)
        return right(self, (latents - mean) / std)

    patch(WanVAE, "decode", decode)


@trap("autoencoder", "posterior sampled, for its mode", "reference latents")
def posterior_sampled(patch):
    def encode(self, pixels):
        mean, log_variance = jnp.split(self.quant(self.encoder(pixels)), 2, axis=-1)
        sample = mean + jnp.exp(log_variance / 2) * jax.random.normal(jax.random.key(0), mean.shape, mean.dtype)
        mean, std = statistics(self)
        return (sample - mean) / std

    patch(WanVAE, "encode", encode)


@trap("autoencoder", "pixels taken to [0, 1], for [-1, 1]", "reference latents")
def pixels_from_zero(patch):
    right = WanVAE.encode
    patch(WanVAE, "encode", lambda self, pixels: right(self, (pixels + 1) / 2))


@trap("autoencoder", "pixels cut off, for rounded", "picture")
def pixels_cut_off(patch):
    patch(steps.jnp, "round", jnp.floor)


# The text encoder


@trap("text encoder", "hidden states after the final norm, for before", "hidden states")
def after_the_final_norm(patch):
    right = LanguageModel.__call__
    normed = lambda x: rms_norm(x, jnp.ones(x.shape[-1], jnp.float32), 1e-6)
    patch(LanguageModel, "__call__", lambda self, *inputs: normed(right(self, *inputs)))


@trap("text encoder", "RoPE pairs channels 2i and 2i + 1, for i and i + H/2", "hidden states")
def interleaved_pairs(patch):
    def interleaved(x, rotation):
        cos, sin = rotation[0][:, :, None], rotation[1][:, :, None]
        even, odd = x[..., ::2], x[..., 1::2]
        return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)

    patch(qwen3_vl, "rotate_half_split", interleaved)


@trap("text encoder", "frequencies dealt to the three axes in chunks, for in turn", "hidden states")
def mrope_in_chunks(patch):
    chunks = lambda self: tuple(np.repeat((0, 1, 2), self.mrope_section).tolist())
    patch(TextConfig, "axis_of_frequency", property(chunks))


@trap("text encoder", "key head j for the query heads j, j + K, …, for neighbours", "hidden states")
def key_heads_by_turns(patch):
    def by_turns(query, key, value, *, causal):
        count = query.shape[2] // key.shape[2]
        return attention(query, jnp.tile(key, (1, 1, count, 1)), jnp.tile(value, (1, 1, count, 1)), causal=causal)

    patch(qwen3_vl, "attention", by_turns)


@trap("text encoder", "no DeepStack", "hidden states")
def no_deepstack(patch):
    right = LanguageModel.__call__
    patch(LanguageModel, "__call__", lambda self, inputs, features, deepstack: right(self, inputs, features))


@trap("text encoder", "DeepStack one layer late", "hidden states")
def deepstack_late(patch):
    right = LanguageModel.__call__
    late = lambda deepstack: (jnp.zeros_like(deepstack[0]), *deepstack)
    patch(LanguageModel, "__call__", lambda self, inputs, features, deepstack: right(self, inputs, features, late(deepstack)))


@trap("text encoder", "text goes on behind a picture at p + count, for p + max(rows, columns)", "hidden states")
def text_after_every_patch(patch):
    def positions(ids, image_token, grids):
        right = text.multimodal_positions(ids, image_token, grids)
        late = np.arange(len(ids), dtype=np.int32) - right[:, 0]
        for start, (rows, columns) in zip(text._image_starts(ids, image_token, grids), grids, strict=True):
            late[start : start + rows * columns] = late[start]
        return right + late[:, None]

    patch(family, "multimodal_positions", positions)


# The vision tower


@trap("vision tower", "position table stretched with align_corners false", "vision tokens")
def corners_not_aligned(patch):
    def place(rows, columns, config):
        positions, size = place_patches(rows, columns, config)[0], config.grid_size
        source = np.clip((positions + 0.5) * size / np.array([rows, columns]) - 0.5, 0, size - 1)
        low = np.floor(source).astype(np.int32)
        corners = np.stack([low, np.minimum(low + 1, size - 1)])
        shares = np.stack([1 - (source - low), source - low]).astype(np.float32)
        taps = corners[:, None, :, 0] * size + corners[None, :, :, 1]
        weights = shares[:, None, :, 0] * shares[None, :, :, 1]
        return positions, taps.reshape(4, -1).T, weights.reshape(4, -1).T

    patch(family, "place_patches", place)


@trap("vision tower", "RoPE turns columns first, for rows", "vision tokens")
def columns_before_rows(patch):
    flipped = lambda positions, channels, theta: rotation_by_blocks(positions[..., ::-1], channels, theta)
    patch(qwen3_vl_vision, "rotation_by_blocks", flipped)


@trap("vision tower", "patches row by row, for block by block", "vision patches")
def patches_row_by_row(patch):
    def row_by_row(picture, config):
        patches, (rows, columns) = vision.vision_patches(picture, config)
        order = "(row column m k) p -> (row m column k) p"
        return rearrange(patches, order, row=rows // 2, column=columns // 2, m=2), (rows, columns)

    patch(family, "vision_patches", row_by_row)


@trap("vision tower", "numbers of a patch frame first, for channel first", "vision patches")
def frame_first(patch):
    def frame_first(picture, config):
        patches, grid = vision.vision_patches(picture, config)
        return rearrange(patches, "n (c t p) -> n (t c p)", c=3, t=2), grid

    patch(family, "vision_patches", frame_first)


@trap("vision tower", "pictures attend to each other", "vision tokens")
def pictures_see_each_other(patch):
    joined = lambda x: x.reshape(1, -1, *x.shape[2:])
    across = lambda q, k, v, *, lengths: attention(joined(q), joined(k), joined(v)).reshape(q.shape)
    patch(qwen3_vl_vision, "attention", across)


@trap("vision tower", "the MLP's GELU exact, for tanh", "vision MLP")
def vision_gelu_exact(patch):
    patch(VisionBlock, "mlp", lambda self, x: self.down(gelu(self.up(x), approximate=False)))


@trap("vision tower", "the mergers' GELU tanh, for exact", "vision merger")
def merger_gelu_tanh(patch):
    patch(qwen3_vl_vision, "gelu", lambda x, approximate: gelu(x, approximate=True))


# The prompt


@trap("prompt", "template without the backslash and the n", "velocity")
def template_corrected(patch):
    patch(family, "SYSTEM", family.SYSTEM.replace("\\n", ""))


@trap("prompt", "33 tokens dropped, for 34", "velocity")
def drop_33(patch):
    patch(family, "DROPPED", 33)


@trap("prompt", "a line break between picture and prompt", "velocity")
def line_break_after_picture(patch):
    right = family.prompt_tokens
    patch(family, "prompt_tokens", lambda tokenizer, prompt, counts: right(tokenizer, "\n" + prompt, counts))


@trap("prompt", "control tokens in a prompt act", "token ids")
def control_tokens_act(patch):
    acting = lambda tokenizer, words: tokenizer(words, add_special_tokens=False)["input_ids"]
    patch(family, "plain_tokens", acting)


# Pictures


def with_resample(patch, resample):
    right = Image.Image.resize
    patch(Image.Image, "resize", lambda self, size, _: right(self, size, resample))


@trap("pictures", "fitted bicubically, for bilinearly", "pixels")
def fitted_bicubically(patch):
    with_resample(patch, Image.Resampling.BICUBIC)


@trap("pictures", "resized bilinearly for the vision tower, for bicubically", "vision patches")
def vision_bilinear(patch):
    with_resample(patch, Image.Resampling.BILINEAR)


@trap("pictures", "scaled size rounded, for rounded up", "pixels")
def scaled_size_rounded(patch):
    patch(image, "math", SimpleNamespace(ceil=round))


@trap("pictures", "crop rounded to the right and down, for left and up", "pixels")
def crop_to_the_right(patch):
    right = Image.Image.crop
    patch(Image.Image, "crop", lambda self, box: right(self, shifted(self, box)))


def shifted(picture, box):
    left, top, right, bottom = box
    dx, dy = (picture.width - (right - left)) % 2, (picture.height - (bottom - top)) % 2
    return left + dx, top + dy, right + dx, bottom + dy


@trap("pictures", "of equally near buckets the last, for the first in Diffusers' order", "buckets")
def last_of_equal_buckets(patch):
    right = image.buckets
    patch(image, "buckets", lambda base_size: right(base_size)[::-1])


@trap("pictures", "nearest bucket by the ratio's logarithm, for its plain difference", "buckets")
def ratio_by_logarithm(patch):
    def nearest(height, width, base_size):
        return min(image.buckets(base_size), key=lambda size: abs(math.log(size[0] / size[1] * width / height)))

    patch(image, "nearest_bucket", nearest)


@trap("pictures", "halves of 32 rounded up, for to even", "vision sizes")
def halves_up(patch):
    patch(vision, "round", lambda x: math.floor(x + 0.5), raising=False)


# What Edit-Plus does its own way


@trap("Edit-Plus", "references fitted to the result's size, for each to its own bucket", "velocity")
def references_of_one_size(patch):
    right = family.fit_pictures
    patch(family, "fit_pictures", lambda request, size, own_sizes: right(request, size, False))


@trap("Edit-Plus", "size from the first reference, for the last", "size")
def size_of_the_first(patch):
    right = family.target_size
    first = lambda request: dataclasses.replace(request, pictures=request.pictures[:1])
    patch(family, "target_size", lambda request: right(first(request)))
