"""Mistakes that are easily made when Qwen-Image is written anew, each made on purpose by patching joyjax.

As tests/traps.py, which has what both families share; `tests/parity/test_qwen_traps.py` runs a picture with each.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import traps
from flax import nnx
from traps import Patch, Trap, acting_tokens, entering

from joyjax.convert import qwen_image as keys
from joyjax.families import qwen_image, qwen_image_prompt
from joyjax.families import qwen_image_stages as stages
from joyjax.layers import double_stream
from joyjax.layers.double_stream import Stream
from joyjax.models import qwen2_5_vl
from joyjax.models import qwen_image as transformer
from joyjax.models.qwen2_5_vl import LanguageModel, TextConfig
from joyjax.models.qwen_image import QwenImageTransformer
from joyjax.sampling import euler
from joyjax.sampling import guided_step as steps
from joyjax.sampling.euler import Euler
from joyjax.sampling.guidance import Guidance
from joyjax.sampling.schedule import ScheduleConfig

TRAPS: list[Trap] = []
trap = entering(TRAPS)


# The transformer


@trap("transformer", "rows and columns counted from the corner, for the middle", "velocity")
def rope_from_the_corner(patch):
    patch.around(stages, "image_positions", lambda right, sizes: right(sizes) - right(sizes).min(axis=0))


@trap("transformer", "of an odd side the middle rounded down, for up", "velocity")
def odd_middle_rounded_down(patch):
    def wrong(right, sizes):
        return right(sizes) + np.array([0, *(side % 2 for side in sizes[0])], np.int32)

    patch.around(stages, "image_positions", wrong)


@trap("transformer", "text at positions from 0, for from half the longer side", "velocity")
def text_from_zero(patch):
    patch.set(stages, "text_start", lambda sizes: 0)


@trap("transformer", "text one position late", "velocity")
def text_one_late(patch):
    patch.around(stages, "text_start", lambda right, sizes: right(sizes) + 1)


trap("transformer", "RoPE's axes are column, row, frame, for frame, row, column", "velocity")(traps.column_first)
trap("transformer", "RoPE's theta 256, for 10000", "velocity")(traps.theta_of_the_class)
trap("transformer", "RoPE pairs channels i and i + H/2, for 2i and 2i + 1", "velocity")(traps.half_split)
trap("transformer", "queries and keys normalised after RoPE, for before", "velocity")(traps.norm_after_rope)


@trap("transformer", "time embedding [sin, cos], for [cos, sin]", "velocity")
def sine_first(patch):
    def wrong(right, time, size, **scale):
        return jnp.roll(right(time, size, **scale), size // 2, axis=-1)

    patch.around(transformer, "timestep_embedding", wrong)


@trap("transformer", "sigma embedded, for 1000·sigma", "velocity")
def time_not_scaled(patch):
    patch.around(transformer, "timestep_embedding", lambda right, time, size, **scale: right(time, size))


@trap("transformer", "no norm of the text (`txt_norm`)", "velocity")
def no_txt_norm(patch):
    def wrong(right, self, *inputs):
        vars(self)["txt_norm"] = lambda x: x
        return right(self, *inputs)

    patch.around(QwenImageTransformer, "first_block", wrong)


@trap("transformer", "head read as shift, scale, for scale, shift", "velocity")
def head_shift_first(patch):
    def wrong(right, x, scale, shift, **eps):
        return right(x, shift, scale, **eps)

    patch.around(transformer, "layer_norm_scale_shift", wrong)


def around_modulations(patch, wrong):
    patch.around(
        transformer,
        "modulations",
        lambda right, *inputs: [tuple(map(wrong, pair)) for pair in right(*inputs)],
    )


@trap("transformer", "modulation read as scale, shift, gate, for shift, scale, gate", "velocity")
def scale_first(patch):
    around_modulations(patch, lambda x: x[:, :, np.array([1, 0, 2, 4, 3, 5])])


@trap("transformer", "the MLP's half of the modulation before that of attention", "velocity")
def halves_swapped(patch):
    around_modulations(patch, lambda x: x[:, :, np.array([3, 4, 5, 0, 1, 2])])


@trap("transformer", "gates through tanh, for as they are", "velocity")
def gates_through_tanh(patch):
    gates = np.array([2, 5])
    around_modulations(patch, lambda x: x.at[:, :, gates].set(jnp.tanh(x[:, :, gates])))


@trap("transformer", "modulations of image and text swapped", "velocity")
def streams_swapped(patch):
    patch.around(transformer, "modulations", lambda right, *inputs: [pair[::-1] for pair in right(*inputs)])


@trap("transformer", "no SiLU before the modulation", "velocity")
def no_silu(patch):
    def wrong(blocks, temb):
        return [tuple(stream.modulation(temb) for stream in (block.img, block.txt)) for block in blocks]

    patch.set(transformer, "modulations", wrong)


@trap("transformer", "patches flattened channel last into img_in, for channel first", "velocity", reload=True)
def patches_in_channel_last(patch):
    patch.set(keys, "token_in", lambda height, width: keys.transpose)


@trap("transformer", "patches unfolded channel last from proj_out, for channel first", "velocity", reload=True)
def patches_out_channel_last(patch):
    right = keys.token_out
    patch.set(
        keys,
        "token_out",
        lambda height, width: dataclasses.replace(
            right(height, width),
            view=lambda shape: shape,
            axes=lambda shape: (1, 0) if len(shape) > 1 else (0,),
        ),
    )


@trap("transformer", "padding of the shorter prompt attended to", "velocity")
def padding_attended_to(patch):
    patch.around(stages, "condition", lambda right, *inputs: dataclasses.replace(right(*inputs), txt_lengths=None))


@trap("transformer", "references at the time of the step, for time 0 (2511)", "velocity beside references at time 0")
def references_at_the_same_time(patch):
    patch.around(QwenImageTransformer, "_embed_times", lambda right, *inputs: right(*inputs)[:, np.array([0, 0])])


@trap(
    "transformer", "the target at time 0 and the references at that of the step", "velocity beside references at time 0"
)
def times_swapped(patch):
    def wrong(right, *inputs, **how):
        layout, tokens = right(*inputs, **how)
        select = layout.img_select
        return dataclasses.replace(layout, img_select=None if select is None else 1 - select), tokens

    patch.around(transformer, "lay_out", wrong)


@trap("transformer", "attention's gate of the step for the references too", "velocity beside references at time 0")
def attention_gate_not_selected(patch):
    def wrong(right, x, y, gate, *inputs, **how):
        return right(x, y, jnp.stack([gate[:, 0]] * 2, axis=1), *inputs, **how)

    patch.around(double_stream, "residual_gate_layer_norm_scale_shift_select01", wrong)


@trap("transformer", "the MLP's gate of the step for the references too", "velocity beside references at time 0")
def mlp_gate_not_selected(patch):
    def wrong(right, x, y, gate, index, **how):
        return right(x, y, gate, 0 * index, **how)

    patch.around(double_stream, "residual_gate_select01", wrong)


@trap("transformer", "only the norm before attention selects", "velocity beside references at time 0")
def second_norm_not_selected(patch):
    def wrong(right, x, y, gate, scale, shift, *inputs, **how):
        scale, shift = (jnp.stack([vectors[:, 0]] * 2, axis=1) for vectors in (scale, shift))
        return right(x, y, gate, scale, shift, *inputs, **how)

    patch.around(double_stream, "residual_gate_layer_norm_scale_shift_select01", wrong)


@trap("transformer", "text at time 0", "velocity beside references at time 0")
def text_at_time_0(patch):
    def wrong(right, blocks, temb):
        return [(img, txt) for (img, _), (_, txt) in zip(right(blocks, temb), right(blocks, temb[:, -1:]), strict=True)]

    patch.around(transformer, "modulations", wrong)


@trap("transformer", "head at time 0", "velocity beside references at time 0")
def head_at_time_0(patch):
    def wrong(right, self, tokens, first_output):
        return right(self, tokens, dataclasses.replace(first_output, temb=first_output.temb[:, -1:]))

    patch.around(QwenImageTransformer, "head", wrong)


@trap("transformer", "the MLPs' GELU exact, for tanh", "transformer MLP")
def mlp_gelu_exact(patch):
    patch.set(Stream, "mlp", lambda self, x: self.down(nnx.gelu(self.up(x), approximate=False)))


# Guidance and schedule


trap("guidance", "conditional + g·(conditional − unconditional), for unconditional + …", "latents")(
    traps.guided_from_conditional
)
trap("guidance", "the two rows swapped", "latents")(traps.guidance_rows_swapped)
trap("guidance", "norm not restored", "latents")(traps.norm_not_restored)


@trap("guidance", "norm restored latent pixel by latent pixel, for token by token", "latents")
def norm_of_pixels(patch):
    patch.around(steps, "guide", lambda right, v, scale, how: right(v, scale, Guidance(v.shape[-1] // 4)))


@trap("schedule", "mu clamped to base_shift and max_shift", "schedule")
def mu_clamped(patch):
    def wrong(right, self, tokens):
        return min(max(right(self, tokens), self.base_shift), self.max_shift)

    patch.around(ScheduleConfig, "mu", wrong)


@trap("schedule", "no stretch to the terminal level", "schedule")
def no_terminal(patch):
    def wrong(right, count, config, *given, **mu):
        return right(count, dataclasses.replace(config, shift_terminal=0.0), *given, **mu)

    patch.around(euler, "sigmas", wrong)


@trap("schedule", "mu for e^mu", "schedule")
def linear_shift(patch):
    def wrong(right, count, config, *given, **mu):
        return right(count, dataclasses.replace(config, time_shift_type="linear"), *given, **mu)

    patch.around(euler, "sigmas", wrong)


@trap("schedule", "levels before the shift down to 1/1000, for 1/steps", "schedule")
def levels_of_the_scheduler(patch):
    patch.set(euler, "even_levels", lambda count: np.linspace(1, 1 / 1000, count))


@trap("schedule", "mu of the padded number of tokens", "schedule")
def mu_of_padding(patch):
    patch.around(Euler, "shift", lambda right, self, tokens: right(self, stages.token_class(tokens)))


@trap("schedule", "the network given 1000·sigma, for sigma", "latents")
def time_is_a_timestep(patch):
    def wrong(right, self, *inputs):
        levels = right(self, *inputs)
        return dataclasses.replace(levels, time=levels.time * np.float32(1000))

    patch.around(Euler, "levels", wrong)


# The autoencoder


trap("autoencoder", "norm with an epsilon beside the mean square, for an L2 norm", "norm of small numbers")(
    traps.norm_with_epsilon
)
trap("autoencoder", "latents decoded without undoing the normalisation", "decoded")(traps.latents_not_denormalised)
trap("autoencoder", "upsampling bilinear, for nearest", "decoded")(traps.bilinear_upsampling)
trap("autoencoder", "pixels cut off, for rounded", "picture")(traps.pixels_cut_off)


# The text encoder


@trap("text encoder", "hidden states before the final norm, for after", "hidden states")
def before_the_final_norm(patch):
    def wrong(right, self, *inputs):
        vars(self)["norm"] = lambda x: x
        return right(self, *inputs)

    patch.around(LanguageModel, "__call__", wrong)


@trap("text encoder", "the last layer but one, for the last", "hidden states")
def one_layer_less(patch):
    patch.around(
        qwen2_5_vl,
        "decode",
        lambda right, embed, layers, *inputs, **how: right(embed, list(layers)[:-1], *inputs, **how),
    )


trap("text encoder", "key head j for query heads j, j + K, …, for neighbours", "hidden states")(
    traps.key_heads_by_turns
)
trap("text encoder", "attention in both directions, for causal", "hidden states")(traps.text_sees_ahead)
trap("text encoder", "RoPE pairs channels 2i and 2i + 1, for i and i + H/2", "hidden states")(traps.interleaved_pairs)


@trap("text encoder", "frequencies dealt to the three axes in turn, for in chunks", "hidden states of three axes")
def mrope_in_turn(patch):
    def wrong(self):
        left, axes = list(self.mrope_section), []
        while any(left):
            for axis in range(3):
                if left[axis]:
                    left[axis] -= 1
                    axes.append(axis)
        return tuple(axes)

    patch.set(TextConfig, "axis_of_frequency", property(wrong))


# The prompt


@trap("prompt", "33 tokens dropped, for 34", "velocity")
def drop_33(patch):
    patch.set(stages, "DROPPED", 33)


def around_rows(patch, change):
    def wrong(right, *inputs):
        rows, notes = right(*inputs)
        return [change(row) for row in rows], notes

    patch.around(stages, "prompt_rows", wrong)


@trap("prompt", "the five closing tokens dropped", "velocity")
def closing_tokens_dropped(patch):
    around_rows(patch, lambda row: row[:-5])


@trap("prompt", "the template's line breaks spelt out, as JoyImage has them", "token ids")
def line_break_spelt_out(patch):
    patch.set(qwen_image_prompt, "SYSTEM", qwen_image_prompt.SYSTEM.replace("\n", "\\n"))


@trap("prompt", "control tokens in a prompt act", "token ids")
def control_tokens_act(patch):
    patch.set(qwen_image_prompt, "plain_tokens", acting_tokens)


@trap("prompt", "negative prompt empty, for one space", "velocity")
def negative_prompt_empty(patch):
    family = qwen_image.TEXT_TO_IMAGE
    patch.set(
        qwen_image,
        "TEXT_TO_IMAGE",
        dataclasses.replace(family, defaults={**family.defaults, "negative_prompt": ""}),
    )


def few_states(patch: Patch) -> None:
    patch.set(qwen_image_prompt, "LONGEST_PROMPT", 12)
    patch.set(stages, "LONGEST_PROMPT", 12)


@trap("prompt", "the last 512 hidden states of a long prompt kept, for the first", "velocity", given=few_states)
def end_of_a_prompt_kept(patch):
    def wrong(right, request, tokenizer):
        rows, notes = right(request, tokenizer)
        whole = qwen_image_prompt.prompt_tokens(tokenizer, request.prompt)
        return [*rows[:-1], whole[: stages.DROPPED] + whole[-12:]], notes

    patch.around(stages, "prompt_rows", wrong)


@trap("prompt", "512 tokens with the template's, for without", "velocity", given=few_states)
def cut_with_the_template(patch):
    around_rows(patch, lambda row: row[: 34 + 12 - 6])
