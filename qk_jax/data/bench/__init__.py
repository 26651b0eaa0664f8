"""What the data costs on this machine: imports, and the plan of a large set."""
