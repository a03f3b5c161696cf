"""Training loops: `fit`, its callbacks and history, several processes."""
