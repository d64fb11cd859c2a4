"""The options of an edit and of loading: one table for Python, the command line, rows, recipes and `warmup`.

To add an option of an edit, add an entry to `EDIT`, a parameter to `joyjax.edit`, and its description to the docstring
there. An option of some families only has `every_family=False`: a family has it if its `defaults` name it, and reads it
from `Request.own`. The table names no family.
"""

import dataclasses
from typing import Any, Literal, get_args

from joyjax.errors import RequestError
from joyjax.option_types import (
    OptionType,
    choice,
    falling_levels,
    files,
    function,
    number,
    number_or_one_a_step,
    seed,
    switch,
    text,
    whole,
)

Fit = Literal["crop", "pad"]
VAEMode = Literal["exact", "tiled", "patch", "auto"]
FITS: tuple[Fit, ...] = get_args(Fit)
VAE_MODES: tuple[VAEMode, ...] = get_args(VAEMode)
BASE_SIZES = (256, 512, 768, 1024)  # of most families
ALL_BASE_SIZES = (256, 512, 640, 768, 1024)
MOST_LAYERS = 64
DTYPES = ("bfloat16", "float32")
EXACT = "exact"  # the form of a stored weight that is not quantized
QUANTIZED_FORMS = ("float8",)
KERNELS = ("auto", "xla", "pallas")
CACHE_KINDS = ("taylor", "first-block")  # the first is the default: docs/speed.md has the measurements
HIGHEST_CACHE_THRESHOLD = 1e6  # a threshold that no change reaches
MOST_STEPS = 1000
LOWEST_SIDE, HIGHEST_SIDE = 16, 8192
HIGHEST_GUIDANCE = 1000.0

BASIC, SIZES, SAMPLING = "Options", "Sizes and masks", "Sampling"
SPEED, DEVICES, RECORDS = "Speed and memory", "Devices", "Results and records"
SUBJECTS = (BASIC, SIZES, SAMPLING, SPEED, DEVICES, RECORDS)  # headings of help, in this order

REQUIRED: Any = ...  # marks an option without a default


@dataclasses.dataclass(frozen=True)
class CacheRule:
    """Reuse blocks if mean|r - r_full| / mean|r_full| < `threshold`, where r is the first block's residual."""

    threshold: float
    kind: str = CACHE_KINDS[0]

    def __str__(self) -> str:
        """Return the rule in the form that `parse` reads."""
        short = f"{self.threshold:g}"
        return f"{self.kind}:{short if float(short) == self.threshold else repr(self.threshold)}"

    @classmethod
    def parse(cls, value: Any) -> "CacheRule":
        """Read `0.1`, `"0.1"` or `"taylor:0.1"`; raises ValueError with what is expected."""
        kind, colon, threshold = value.rpartition(":") if isinstance(value, str) else ("", "", value)
        try:
            threshold = float("nan") if isinstance(threshold, bool) else float(threshold)
        except (TypeError, ValueError):
            threshold = float("nan")
        if (colon and kind not in CACHE_KINDS) or not 0 <= threshold <= HIGHEST_CACHE_THRESHOLD:
            kinds = ", ".join(f"{kind}:0.1" for kind in CACHE_KINDS)
            raise ValueError(
                f"a threshold from 0 to {HIGHEST_CACHE_THRESHOLD:g}, such as 0.1, or a kind with one: {kinds}"
            )
        return cls(threshold, kind or CACHE_KINDS[0])


def _cache_rule() -> OptionType:
    def check(name: str, value: Any) -> CacheRule:
        try:
            return CacheRule.parse(value)
        except ValueError as error:
            raise RequestError(f"{name} is {value!r:.200}; expected {error}") from None

    def plain(rule: CacheRule | None) -> str | None:
        return None if rule is None else str(rule)

    kinds = " or ".join(f"`{kind}:0.1`" for kind in CACHE_KINDS)
    return OptionType(f"threshold such as 0.1, or a kind with one: {kinds}", check, plain=plain, metavar="X")


@dataclasses.dataclass(frozen=True, eq=False)
class Option:
    """An option of `joyjax.edit` or `joyjax.load`.

    Attributes:
        name: in Python, in rows and in recipes; on the command line with `--`, and `-` for `_`.
        type: how its values are checked and parsed.
        help: description for the command line and docs/options.md.
        default: default in Python, and the neutral value that families without the option accept. REQUIRED: none.
        inherited: None stands for the checkpoint's default, else the family's.
        default_text: text in help in place of the default.
        every_family: True: all families have it except those that exclude it (`Family.without`). False: only families
            whose `defaults` name it.
        in_recipe: whether a recipe stores its value.
        missing: the value for a recipe of version 1 without it, which reproduces its picture. REQUIRED: every recipe
            has it.
        compiles: whether another value may need another compiled program.
        row, command_line: whether it may be given in a row of a batch, or on the command line.
        subject: the heading in help.
        short: the short form on the command line.
        metavar: placeholder of the value in help, if not that of the type.
    """

    name: str
    type: OptionType
    help: str
    default: Any = None
    _: dataclasses.KW_ONLY
    subject: str = BASIC
    inherited: bool = False
    default_text: str = ""
    every_family: bool = True
    in_recipe: bool = False
    missing: Any = REQUIRED
    compiles: bool = False
    row: bool = True
    command_line: bool = True
    short: str = ""
    metavar: str = ""

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> Any:
        """Return the value for the request; None is accepted if it is the default.

        Raises:
            RequestError: with the value and what is expected.
        """
        return None if value is None and self.default is None else self.type.check(self.name, value)

    def shown_default(self) -> str:
        """Return the default as shown in help; empty if the help states it, or there is none."""
        if self.default_text or self.inherited:
            return self.default_text or "the model's own"
        if self.default is None or self.default is False or self.default is REQUIRED:
            return ""
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def _table(*options: Option) -> dict[str, Option]:
    return {option.name: option for option in options}


EDIT = _table(
    Option(
        "image",
        files("picture, or a list of them: PIL.Image or uint8 array in Python"),
        "Picture to edit: a file, a URL, or - for standard input. Repeat for several references. Without a picture: "
        "text to image.",
        short="-i",
    ),
    Option("prompt", text(), "What to change.", REQUIRED, in_recipe=True),
    Option("negative_prompt", text(), "What to steer away from.", subject=SAMPLING, inherited=True, in_recipe=True),
    Option(
        "steps", whole(1, MOST_STEPS), "Number of denoising steps.", subject=SAMPLING, inherited=True, in_recipe=True
    ),
    Option(
        "sigmas",
        falling_levels(MOST_STEPS),
        "Noise levels in place of the schedule's, falling from at most 1, one for each step, as in 1,0.7,0.3.",
        subject=SAMPLING,
        in_recipe=True,
        missing=None,
    ),
    Option(
        "guidance_scale",
        number_or_one_a_step(
            f"a number up to {HIGHEST_GUIDANCE:g}, 1 or less for no guidance",
            lambda scale: abs(scale) <= HIGHEST_GUIDANCE,
        ),
        "Strength of classifier-free guidance; 1 or less: none. Or one for each step, as in 4,4,1.",
        subject=SAMPLING,
        inherited=True,
        in_recipe=True,
        compiles=True,
    ),
    Option(
        "guidance_until",
        number(
            "a share of the steps, above 0 and up to 1",
            lambda share: 0 < share <= 1,
            "for no guidance at all give guidance_scale=1",
        ),
        "Share of the steps, from the first one on, that have guidance. Below 1: an approximation.",
        1.0,
        subject=SPEED,
        in_recipe=True,
        missing=1.0,
        compiles=True,
    ),
    Option(
        "cfg_normalize",
        switch(),
        "Restore the norm of the conditional prediction after guidance, for models that leave it open.",
        subject=SAMPLING,
        inherited=True,
        every_family=False,
        in_recipe=True,
        missing=None,
        compiles=True,
    ),
    Option("seed", seed(), "Seed of the noise: a whole number, or `random`.", 0, in_recipe=True),
    Option(
        "noise",
        OptionType("float32 array `[1, height/8, width/8, channels]`, for layers `[1, layers + 1, …]`"),
        "Initial noise in place of that of the seed.",
        in_recipe=True,  # as the name of the rule that generated it
        row=False,
        command_line=False,
    ),
    Option(
        "height",
        whole(LOWEST_SIDE, HIGHEST_SIDE),
        "Height of the result in pixels, with --width; rounded to a size that the model has.",
        subject=SIZES,
        default_text="the picture's",
        in_recipe=True,
    ),
    Option(
        "width",
        whole(LOWEST_SIDE, HIGHEST_SIDE),
        "Width of the result in pixels, with --height.",
        subject=SIZES,
        default_text="the picture's",
        in_recipe=True,
    ),
    Option(
        "exact_size",
        switch(),
        "Take --height and --width as they are, without rounding.",
        False,
        subject=SIZES,
        in_recipe=True,
        missing=False,
    ),
    Option(
        "base_size",
        choice(*ALL_BASE_SIZES),
        "Area of the result, as the side of a square, among those that the model has.",
        subject=SIZES,
        inherited=True,
        in_recipe=True,
        missing=None,
        compiles=True,
    ),
    Option(
        "layers",
        whole(1, MOST_LAYERS),
        "Number of layers that the picture is taken apart into, for models that do that.",
        subject=SIZES,
        inherited=True,
        every_family=False,
        in_recipe=True,
        missing=None,
        compiles=True,
    ),
    Option(
        "fit",
        choice(*FITS),
        "How a picture is fitted to the size: `crop` cuts the edges off, `pad` keeps all of it and removes the padding "
        "from the result.",
        "crop",
        subject=SIZES,
        in_recipe=True,
        missing="crop",
    ),
    Option(
        "mask",
        files("picture in grey, of the size of the last reference"),
        "White where the picture may change, black where it must not; of the picture's size.",
        subject=SIZES,
    ),
    Option(
        "paste_back",
        switch(),
        "Put the result back into the picture, at the picture's own resolution.",
        False,
        subject=SIZES,
        in_recipe=True,
        missing=False,
    ),
    Option(
        "vae_encode",
        choice(*VAE_MODES),
        "How the autoencoder encodes pictures; all but `exact` are approximations.",
        "exact",
        subject=SPEED,
        in_recipe=True,
        missing="exact",
        compiles=True,
    ),
    Option(
        "vae_decode",
        choice(*VAE_MODES),
        "How the autoencoder decodes the result; all but `exact` are approximations, and `tiled` needs the least "
        "memory.",
        "exact",
        subject=SPEED,
        in_recipe=True,
        missing="exact",
        compiles=True,
    ),
    Option(
        "cache",
        _cache_rule(),
        "Skip most blocks of the transformer in steps where they change less than this, as in 0.1; an approximation: "
        "docs/speed.md.",
        subject=SPEED,
        in_recipe=True,
        missing=None,
        compiles=True,
    ),
    Option(
        "callback",
        function("function of one event"),
        "Called after each step.",
        row=False,
        command_line=False,
    ),
)

LOAD = _table(
    Option(
        "model",
        text(),
        "Diffusers folder, folder that `joyjax convert` wrote, or hub id.",
        default_text="the demo",
        short="-m",
        metavar="MODEL",
    ),
    Option("dtype", choice(*DTYPES), "Dtype of parameters and matrix products.", DTYPES[0], subject=SPEED),
    Option(
        "mesh",
        OptionType("jax.sharding.Mesh; on the command line axes such as `tensor=4,sequence=2`"),
        "Split over devices, as in tensor=4,sequence=2; axes: data, cfg, sequence, tensor.",
        subject=DEVICES,
        metavar="AXES",
    ),
    Option(
        "quantize",
        choice(EXACT, *QUANTIZED_FORMS),
        "Store the transformer's linear maps in fewer bits: `float8` halves their memory; an approximation: "
        "docs/speed.md.",
        subject=SPEED,
        default_text="as stored",
    ),
    Option("linear", choice(EXACT, *QUANTIZED_FORMS), "Another name of --quantize.", subject=SPEED),
    Option(
        "kernels",
        choice(*KERNELS),
        "Fused GPU kernels of the transformer: `auto` measures them once on each GPU and runs those that are right and "
        "faster than XLA's own, `xla` runs none, `pallas` all: docs/kernels.md.",
        KERNELS[0],
        subject=SPEED,
    ),
    Option(
        "progress",
        function("function of the bytes read and of all"),
        "Called while weights are read.",
        command_line=False,
    ),
)
