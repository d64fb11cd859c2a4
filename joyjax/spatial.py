"""Public import of JoyImage's spatial prompts: move an object, rotate one, or move the camera."""

from joyjax.families.joyimage_spatial import camera, move, rotate

__all__ = ["camera", "move", "rotate"]
