"""Records of what was used, kept until a meter has them, whichever process is killed."""
