"""Adapters: from Tinker, a hub, a bucket, a folder or an upload; and their part in other requests."""
