"""Several processes, one per device, that train one model together."""
