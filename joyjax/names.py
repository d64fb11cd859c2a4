"""Names that other programs use for the arguments of joyjax, and their equivalents here.

One table for keyword arguments in Python, rows of `joyjax batch` and options of the command line. Its names are in
lower case, with `_` for `-` and without leading dashes.
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec, TypeVar

from joyjax.errors import RequestError
from joyjax.options import EDIT, LOAD

MAYBE = "did you mean "

P = ParamSpec("P")
R = TypeVar("R")

# The arguments of each public function, for messages that name the function with an argument.
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "edit": tuple(EDIT),
    "load": tuple(LOAD),
    "edit_batch": ("requests", "batch_size"),
}


@dataclasses.dataclass(frozen=True)
class Instead:
    """The equivalent of a foreign name.

    Attributes:
        arguments: the equivalent arguments of `joyjax.edit` or `joyjax.load`. Options of the command line have the same
            names, with `-` for `_`.
        option: the equivalent option of `joyjax edit`, if no argument is equivalent.
        note: a further remark. Without arguments it is the whole remedy in Python, and without an option on the command
            line as well.
    """

    arguments: tuple[str, ...] = ()
    option: str = ""
    note: str = ""


def _use(*arguments: str, note: str = "") -> Instead:
    return Instead(arguments, note=note)


def _no(note: str) -> Instead:
    return Instead(note=note)


_MORE_IMAGES = Instead(
    option="--num-images", note="call edit once for each seed, or edit_batch with one request for each seed"
)
_OUTPUT = Instead(
    option="--output", note="write the result with result.save(path); a row of `joyjax batch` names its result by id"
)
_DEVICE = _no(
    "JAX chooses the device, by the variables JAX_PLATFORMS (cpu or cuda) and CUDA_VISIBLE_DEVICES; for several "
    "devices use mesh"
)
_SAMPLER = _no("joyjax has the model's own sampler, flow matching with Euler steps; leave it out")
_EMBEDDINGS = _use("prompt", note="as text; joyjax takes no embeddings")
_LEAVE = _no("joyjax has no equivalent; leave it out")

_TABLE: tuple[tuple[str, Instead], ...] = (
    (
        "num_inference_steps inference_steps num_steps n_steps sampling_steps sample_steps ddim_steps denoising_steps "
        "number_of_steps",
        _use("steps"),
    ),
    (
        "cfg cfg_scale cfgscale cfg_guidance guidance guidance_strength true_cfg true_cfg_scale text_guidance_scale "
        "unconditional_guidance_scale scale distilled_cfg_scale txt_cfg text_cfg_scale",
        _use("guidance_scale"),
    ),
    (
        "image_guidance_scale image_cfg_scale img_cfg",
        _no("the model has guidance by the prompt only; leave it out"),
    ),
    ("negative neg negative_prompts neg_prompt n_prompt uncond_prompt negative_text", _use("negative_prompt")),
    ("generator rng key rng_key random_state", _use("seed", note="a whole number; joyjax draws its own noise from it")),
    ("random_seed manual_seed noise_seed rand_seed rng_seed", _use("seed")),
    ("seeds", _use("seed", note="one whole number for each edit")),
    (
        "images image_path image_paths img imgs input inputs input_image input_images init init_img init_image "
        "init_images source source_image src reference references reference_image reference_images ref_image "
        "ref_images image_reference image_file condition_image control_image picture pictures photo file files",
        _use("image"),
    ),
    ("image_url image_urls url", _use("image")),
    ("instruction edit_prompt edit_instruction text caption positive positive_prompt prompt_2", _use("prompt")),
    ("prompts", _use("prompt", note="one text for each edit; several edits: edit_batch or `joyjax batch`")),
    ("mask_image mask_path image_mask inpaint_mask masked_image mask_file", _use("mask")),
    ("mask_blur mask_feather feather blur", _use("mask", note="drawn with grey edges, which blend")),
    ("masked_image_latents padding_mask_crop inpainting_fill inpaint_full_res", _use("mask", "paste_back")),
    (
        "strength denoise denoise_strength denoising_strength image_strength init_strength img2img_strength",
        _no("the model edits by the prompt, and every edit starts from noise, so there is no strength; leave it out"),
    ),
    ("size image_size resolution dimensions target_size aspect_ratio aspect ratio", _use("height", "width")),
    ("h", _use("height")),
    ("w", _use("width")),
    ("max_area target_area base_resolution", _use("base_size", note="the side of the square with that area")),
    ("resize_mode resize crop_mode", _use("fit", note='"crop" or "pad"')),
    (
        "num_images_per_prompt num_outputs num_samples n_samples n_images n_iter batch_count images_per_prompt "
        "number_of_images iterations samples num_images",
        _MORE_IMAGES,
    ),
    ("n", _MORE_IMAGES),
    ("latents latent_image initial_noise", _use("noise", note="[1, height/8, width/8, channels], channels last")),
    ("timesteps", _use("sigmas", note="noise levels from 1 to above 0")),
    ("sampler sampler_name sampling_method scheduler scheduler_name", _SAMPLER),
    ("shift flow_shift mu", _no("the checkpoint's scheduler sets the shift of the noise levels; leave it out")),
    ("eta clip_skip enable_denormalization", _LEAVE),
    (
        "lora loras lora_path lora_paths lora_scale lora_scales lora_weights adapter",
        _no("this version of joyjax takes no LoRA; merge it into the checkpoint with the program that trained it"),
    ),
    (
        "prompt_embeds prompt_embeds_mask pooled_prompt_embeds negative_prompt_embeds negative_prompt_embeds_mask",
        _EMBEDDINGS,
    ),
    ("attention_kwargs joint_attention_kwargs cross_attention_kwargs ip_adapter_image safety_checker", _LEAVE),
    (
        "max_sequence_length text_token_max_length",
        _no("a prompt is never cut, one that is too long is refused; leave it out"),
    ),
    (
        "output_type return_dict response_format",
        _no("edit returns a joyjax.Result, whose image is a PIL picture; leave it out"),
    ),
    (
        "callback_on_step_end callback_steps progress_callback step_callback on_step",
        _use("callback", note="a function of one event, which has step, steps, latents and preview()"),
    ),
    ("callback_on_step_end_tensor_inputs", _use("callback", note="its event has the latents")),
    (
        "torch_dtype precision weight_dtype compute_dtype mixed_precision data_type half fp16 bf16 float16 fp32",
        _use("dtype", note='"bfloat16" or "float32"'),
    ),
    ("variant", _use("dtype", note="joyjax reads the files that have no variant in their names, and converts them")),
    (
        "quantization quantization_config load_in_8bit load_in_4bit fp8 float8 bits",
        _use("quantize", note='"float8" halves the memory of the transformer'),
    ),
    (
        "offload cpu_offload enable_model_cpu_offload enable_sequential_cpu_offload lowvram low_vram medvram low_ram",
        _use("quantize", "vae_decode", note='"float8" and "tiled" need less memory; there is no offloading'),
    ),
    ("vae_tiling enable_vae_tiling vae_tile tiled_vae tiled_decode vae_slicing", _use("vae_decode", note='"tiled"')),
    (
        "pretrained_model_name_or_path model_path model_id model_name model_name_or_path model_dir model_folder "
        "checkpoint checkpoint_path ckpt ckpt_path ckpt_dir ckpt_name weights pretrained repo repo_id diffusion_model "
        "base_model",
        _use("model"),
    ),
    ("revision custom_revision", _no('write it into the hub id of the model, as in "owner/name@main"')),
    ("subfolder", _no("as the model name the folder that holds model_index.json")),
    ("cache_dir", _no("the variable HF_HOME sets the folder of the hub's files; leave it out")),
    ("local_files_only", _no("the variable HF_HUB_OFFLINE=1 turns downloads off; leave it out")),
    ("token use_auth_token", _no("log in with `hf auth login`, or set the variable HF_TOKEN; leave it out")),
    (
        "use_safetensors low_cpu_mem_usage trust_remote_code custom_pipeline disable_mmap force_download proxies",
        _LEAVE,
    ),
    ("device devices device_id device_map gpu gpus gpu_id gpu_ids cuda cpu num_gpus", _DEVICE),
    ("tensor_parallel tensor_parallel_size tp ulysses ulysses_degree ring_degree sp_size cfg_parallel", _use("mesh")),
    (
        "output out outfile filename file_name out_file outdir out_dir output_path output_file output_dir "
        "save save_path save_dir save_to dest",
        _OUTPUT,
    ),
    (
        "replay config_from_metadata from_image from_png",
        Instead(option="--from", note="joyjax edit --from FILE does it on the command line"),
    ),
    (
        "stepwise_image_output_dir previews preview preview_path save_intermediates",
        Instead(option="--preview-dir", note="give callback, whose event has preview()"),
    ),
)

INSTEAD: Mapping[str, Instead] = {name: instead for names, instead in _TABLE for name in names.split()}

COMMANDS: Mapping[str, str] = {  # names of commands in other programs
    **dict.fromkeys(
        "generate run create img2img image2image image-to-image txt2img inpaint image imagine prompt".split(), "edit"
    ),
    **dict.fromkeys(("inspect", "metadata"), "info"),
}


def normalized(name: str) -> str:
    """Return a name in the spelling of the table: `--Num-Inference-Steps` is `num_inference_steps`."""
    return name.lstrip("-").replace("-", "_").lower()


def refusal(unknown: Iterable[object], function: str, known: Iterable[str]) -> str:
    """Build the message for unknown arguments, with a remedy for each; `known` are the arguments of the function."""
    known = tuple(known)
    remedies = {str(name): _remedy(str(name), known) for name in unknown}
    message = "; ".join(
        f"{name[:100]!r} is not an argument of {function}" + (f": {remedy}" if remedy else "")
        for name, remedy in remedies.items()
    )
    listed = any(not remedy or remedy.startswith(MAYBE) for remedy in remedies.values())
    return message + (f"; choose from: {', '.join(known)}" if listed else "")


def _remedy(name: str, known: tuple[str, ...]) -> str:
    plain = normalized(name)
    if plain in known or owner(plain):
        return f"use {_qualified(plain, known)}"
    if instead := INSTEAD.get(plain):
        used = " and ".join(_qualified(argument, known) for argument in instead.arguments)
        return ", ".join(filter(None, (used and f"use {used}", instead.note)))
    return "".join(f"{MAYBE}{near}?" for near in difflib.get_close_matches(plain, known, n=1))


def _qualified(argument: str, known: tuple[str, ...]) -> str:
    """Return the name of an argument, qualified by its function if that is another one."""
    if argument in known:
        return argument
    option = f" (--{argument} on the command line)" if owner(argument) == "load" else ""
    return f"{argument} of joyjax.{owner(argument)}{option}"


def owner(argument: str) -> str:
    """Return the public function with an argument; an empty string if there is none."""
    return next((function for function, arguments in ARGUMENTS.items() if argument in arguments), "")


def checks_names(function: Callable[P, R]) -> Callable[P, R]:
    """Make a public function raise RequestError, not TypeError, for arguments that do not match its signature."""
    signature = inspect.signature(function)
    positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def checked(*arguments: P.args, **options: P.kwargs) -> R:
        if unknown := [option for option in options if option not in signature.parameters]:
            raise RequestError(refusal(unknown, function.__name__, signature.parameters))
        try:
            signature.bind(*arguments, **options)
        except TypeError as error:
            raise RequestError(
                f"joyjax.{function.__name__}: {error}; call it as joyjax.{function.__name__}({', '.join(positional)}, "
                "…), with names for the rest"
            ) from None
        return function(*arguments, **options)

    return checked
