"""Routes of the contract that this version answers with 501."""
