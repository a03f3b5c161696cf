"""The networks people train, and with which batches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

BENCH_PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Size:
    """An autoencoder of these widths from the input to the code, mirrored, on this many rows at a time."""

    network: str
    features: tuple[int, ...]
    batch: int

    @property
    def label(self) -> str:
        return "-".join(map(str, self.features))

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(in_features, out_features), first to last."""
        return list(pairwise([*self.features, *self.features[-2::-1]]))

    @property
    def parameters(self) -> int:
        return sum(k * n + n for k, n in self.layers)

    @property
    def products(self) -> int:
        """Multiplications of one row by every weight."""
        return sum(k * n for k, n in self.layers)


NETWORKS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tabular": ((30, 64, 32), (32, 1024, 65536)),
    "mnist": ((784, 256, 128), (256, 1024, 8192)),
    "embeddings": ((768, 256, 64), (4096,)),
    "genes": ((2000, 128, 10), (128, 1024)),
    "recsys": ((20108, 600, 200), (500,)),
    "wide": ((4096, 1024), (4096,)),
}
SIZES = tuple(Size(name, features, batch) for name, (features, batches) in NETWORKS.items() for batch in batches)
