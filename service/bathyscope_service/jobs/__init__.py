"""Jobs: submitting, reading, waiting for, listening to and cancelling them."""
