"""From noise to latents: schedule, solver, guidance, and the compiled steps."""
