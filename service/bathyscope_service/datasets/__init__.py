"""`/v1/datasets`: rows that are uploaded once and named in requests."""
