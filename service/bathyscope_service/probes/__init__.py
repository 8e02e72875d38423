"""Probes and predictions."""
