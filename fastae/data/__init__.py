"""Arrays and files: reading, checking, scaling, writing."""
