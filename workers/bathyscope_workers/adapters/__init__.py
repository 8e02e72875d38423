"""Adapters: from a stranger's archive to a LoRA that PEFT applies exactly, or a problem that says why not.

`unpacking` takes the files out of an archive, `headers` and `config` validate them, `source` reads them, `skeleton` is
the base without its weights, `conversion` places every tensor on it. Nothing here knows of queues or HTTP.
"""
