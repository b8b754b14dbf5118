"""The recycle module at work: it reads what has become known, and makes drafts."""
