"""Which plugins are installed, which can be trusted, and how one is asked."""
