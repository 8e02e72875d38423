"""Processes that are killed, starved and cut off: a short form in `make test`, all of it in `make faults`."""

import os

WHOLE = os.environ.get("BATHYSCOPE_FAULTS") == "whole"
