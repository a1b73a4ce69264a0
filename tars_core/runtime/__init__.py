"""What an engine does while it runs: pool, failover, the way between threads and the loop."""
