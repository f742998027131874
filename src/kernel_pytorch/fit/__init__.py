"""Does a model fit: memory and cost of a step on a device, measured where the device is here, else without it."""
