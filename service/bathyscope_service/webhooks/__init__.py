"""Webhooks: finished jobs are told to a URL that their request named.

`targets` says which URLs and addresses are allowed, `exchange` makes one signed POST to one of them, `courier` takes
what is due from the queue that all front ends share, and tries again what went wrong.
"""
