"""Pictures, random numbers, who sees what and when, and encodings kept on disk."""
