"""Files and settings as they are found elsewhere: read as their own programs read them, or refused by name."""
