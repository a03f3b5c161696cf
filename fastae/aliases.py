"""Names that classes had in fastae 0.1 and still have in files of `torch.save(model)`, which pickle them by name.

Such a file is read as `import fastae.autoencoder`, then `DenseAutoencoder` of that. Each old module stands in
`sys.modules` as an empty one that fetches the class from its new module when asked. It does not stand in the package:
`fastae.linear_act`, `fastae.mse_loss` and `fastae.patch` are functions.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# old module -> (new module, what moved)
MOVED: dict[str, tuple[str, tuple[str, ...]]] = {
    "fastae.autoencoder": ("fastae.models.dense", ("DenseAutoencoder",)),
    "fastae.linear_act": ("fastae.nn.linear_act", ("LinearAct",)),
    "fastae.tied": ("fastae.nn.tied_linear_act", ("TiedLinearAct",)),
    "fastae.scaling": ("fastae.data.scaling", ("Scaler",)),
    "fastae.mse_loss": ("fastae.nn.losses", ("MSELoss",)),
    "fastae.history": ("fastae.train.history", ("History",)),
    "fastae._patched": (
        "fastae.patching.fused_modules",
        ("PatchedLinear", "PatchedMSELoss", "PatchedSequential", "PatchedForward", "Rewritten", "_Import", "_new"),
    ),
}


def register() -> None:
    """Let `import` find the old modules; nothing is imported until a file asks for one of their classes."""
    for name, (module, moved) in MOVED.items():
        sys.modules.setdefault(name, _Alias(name, module, moved))


class _Alias(ModuleType):
    def __init__(self, name: str, module: str, moved: tuple[str, ...]) -> None:
        super().__init__(name, f"Moved to {module}; kept for files of torch.save.")
        self._new_module, self._moved = module, moved

    def __getattr__(self, name: str) -> Any:
        if name not in self._moved:
            raise AttributeError(f"module {self.__name__!r}, now {self._new_module!r}, has no attribute {name!r}")
        return getattr(import_module(self._new_module), name)
