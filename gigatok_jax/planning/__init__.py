"""What a run would be on accelerators that are elsewhere: its programs compiled for them, and what these say."""
