"""Meter: tokenizers, keys, admission and the ledger."""
