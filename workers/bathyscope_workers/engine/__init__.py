"""The engine: the process that owns torch. It knows neither Redis nor the artifact store.

A supervisor starts it as `python -m bathyscope_workers.engine --kind model|cpu --fd N`, where N is its end of
a socketpair, and talks to it in the frames of `protocol`. This package and `protocol` import no torch, so a
supervisor may import them freely.
"""
