"""What models this machine has, and what their files say about themselves."""
