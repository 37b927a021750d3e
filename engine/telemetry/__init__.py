"""What a step costs: time, memory and energy by section, the device's state, and where the figures go."""
