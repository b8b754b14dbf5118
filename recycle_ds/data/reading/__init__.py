"""How documents are read from files as users have them: packings, rows, chats, and what is left out."""
