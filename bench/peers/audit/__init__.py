"""Autoencoders of several libraries against closed forms: `make audit` writes docs/wrong-by-default.md."""
