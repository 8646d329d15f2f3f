"""Tests of the learning rate."""
