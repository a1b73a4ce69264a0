"""Which models lie here, and what their files say about themselves."""
