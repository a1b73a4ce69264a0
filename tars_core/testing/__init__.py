"""For tests, of TARS and of plugins: a backend that does what a script says."""
