"""A worker without models, for tests of load and of schemas.

The supervisor, the broker and the store are the real ones. Only the engine is a double: it speaks the real protocol and
finishes every job at once, with files of the right shape and made-up numbers. `python -m tests.noop.worker` runs one;
`stack(..., noop=True)` starts installations with it.
"""
