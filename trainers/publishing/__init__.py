"""What a run leaves for others: the card, the report, the upload."""
