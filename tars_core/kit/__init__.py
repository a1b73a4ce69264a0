"""For backends: what each would otherwise write for itself."""
