"""Checks that results do not depend on the devices."""
