"""Scripts that another engine's Python runs; nothing else lies beside them, for a script's folder is searched first."""
