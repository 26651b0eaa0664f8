"""What a config costs: parameters, memory, FLOPs, and the speed on the devices at hand."""
