"""POST /v1/completions and its dialects."""
