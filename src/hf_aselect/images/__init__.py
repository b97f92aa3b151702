"""Images as people have them: where they lie, and what they come in."""
