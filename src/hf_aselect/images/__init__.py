"""Images as users have them: folders, files, archives and datasets, and the formats of their rows."""
