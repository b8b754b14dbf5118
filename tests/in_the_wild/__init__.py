"""Files and settings as users have them: read rightly, or refused by name."""
