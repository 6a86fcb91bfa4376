"""From a prompt to its token ids, in fair turns."""
