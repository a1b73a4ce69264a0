"""What this machine, or container, is: processes, memory, processors."""
