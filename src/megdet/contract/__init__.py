"""The proof that a result does not depend on the devices."""
