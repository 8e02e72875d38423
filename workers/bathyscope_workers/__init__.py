"""Workers: a supervisor that owns Redis and engine processes that own torch."""
