"""The ledger: one row for each request, whatever fails."""
