"""From noise to picture: the schedule, guidance, and the jitted stages."""
