"""The three-way rule, which users of the library have as `fastae.verify.check`."""

from fastae_emulator.accuracy import FLOOR, check, check_all, errors

__all__ = ["FLOOR", "check", "check_all", "errors"]
