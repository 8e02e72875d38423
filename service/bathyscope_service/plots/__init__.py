"""Pictures of what jobs made."""
