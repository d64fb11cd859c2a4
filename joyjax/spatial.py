"""The public name of the prompts that JoyImage was trained on for moving, turning and viewing things."""

from joyjax.families.joyimage_spatial import camera, move, rotate

__all__ = ["camera", "move", "rotate"]
