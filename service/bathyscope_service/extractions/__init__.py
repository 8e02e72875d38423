"""Extractions: hidden states of texts."""
