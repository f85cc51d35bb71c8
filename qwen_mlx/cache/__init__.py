"""What a sequence leaves behind for its next token."""
