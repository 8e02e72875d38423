"""Base models on offer, and where they are resident."""
