"""What every generating endpoint shares: generations, and the text that becomes of their tokens."""
