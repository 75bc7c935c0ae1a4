"""How servers end, and what is in the table then."""
