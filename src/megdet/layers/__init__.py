"""Batch normalisation over devices, and the other norm layers."""
