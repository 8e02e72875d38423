"""Rows of datasets that requests name: uploaded ones, those that are made by code, those of the hub."""
