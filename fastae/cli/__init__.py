"""The command `fastae`, one file a group of commands."""
