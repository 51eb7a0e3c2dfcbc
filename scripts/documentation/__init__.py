"""The generated pages of docs/, and the check of every command in README, docs and configs."""
