"""The libraries, each behind the same four calls. A variant imports its library when it is made, and nothing before."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from peers.problem import LR, PeerProblem

SCORE_BATCH = 4096  # rows at a time where a library asks

Rows = NDArray[np.float32]


class Variant:
    """`prepare` makes a model with the seed's weights; `fit` trains it, `score` gives each row's mean squared error."""

    packages: ClassVar[tuple[str, ...]]
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    differs: ClassVar[str] = ""

    def __init__(self, problem: PeerProblem, x: Rows) -> None:
        self.problem, self.x = problem, x
        self.low = problem.precision == "bfloat16"

    def prepare(self, seed: int, epochs: int) -> None:
        raise NotImplementedError

    def fit(self) -> int:
        """Train for the epochs of `prepare`; how many rows went through."""
        raise NotImplementedError

    def reconstruct(self) -> NDArray[Any]:
        raise NotImplementedError

    def score(self) -> NDArray[Any]:
        return np.square(self.reconstruct() - self.x).mean(1)

    def versions(self) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in self.packages}


def import_torch() -> Any:
    """With its compiler, which its optimizers import when they are first made: 144 MiB that no variant adds later."""
    import torch
    import torch._dynamo

    return torch


class Fastae(Variant):
    packages = ("fastae", "torch")
    precisions = ("float32", "bfloat16")

    def __init__(self, problem: PeerProblem, x: Rows) -> None:
        super().__init__(problem, x)

        import fastae

        self.fastae, self.torch = fastae, import_torch()

    def prepare(self, seed: int, epochs: int) -> None:
        self.epochs, self.seed, torch = epochs, seed, self.torch
        self.model = self.fastae.DenseAutoencoder(self.problem.features, code_activation="relu")
        with torch.no_grad():
            layers = (*self.model.encoder, *self.model.decoder)
            for layer, (w, b) in zip(layers, self.problem.weights(seed), strict=True):
                layer.weight.copy_(torch.from_numpy(w))
                layer.bias.copy_(torch.from_numpy(b))

    def fit(self) -> int:
        self.model.fit(
            self.x, epochs=self.epochs, batch_size=self.problem.batch, lr=LR, validation_split=0.0, seed=self.seed,
            precision=self.problem.precision, progress=False,
        )  # fmt: skip
        self.scorer = copy.deepcopy(self.model).bfloat16() if self.low else self.model
        return self.epochs * len(self.x)

    def reconstruct(self) -> NDArray[Any]:
        return self.scorer(self.x)

    def score(self) -> NDArray[Any]:
        return self.scorer.score(self.x)


class Keras(Variant):
    packages = ("keras", "tensorflow-cpu")
    precisions = ("float32", "bfloat16")

    def __init__(self, problem: PeerProblem, x: Rows) -> None:
        super().__init__(problem, x)
        import keras

        keras.mixed_precision.set_global_policy("mixed_bfloat16" if self.low else "float32")
        layers = [keras.Input((problem.widths[0],))]
        for n in problem.widths[1:-1]:
            layers.append(keras.layers.Dense(n, activation="relu"))
        layers.append(keras.layers.Dense(problem.widths[-1], dtype="float32" if self.low else None))
        self.model = keras.Sequential(layers)
        self.model.compile(keras.optimizers.Adam(LR, epsilon=1e-8), "mse")
        self.model.optimizer.build(self.model.trainable_variables)
        self.fresh = [np.array(v) for v in self.model.optimizer.variables]

    def prepare(self, seed: int, epochs: int) -> None:
        """The compiled model stays, so that what is traced once is not traced again; its state is set back."""
        self.epochs = epochs
        self.model.set_weights([t for w, b in self.problem.weights(seed) for t in (w.T, b)])
        for variable, value in zip(self.model.optimizer.variables, self.fresh, strict=True):
            variable.assign(value)

    def fit(self) -> int:
        self.model.fit(self.x, self.x, batch_size=self.problem.batch, epochs=self.epochs, verbose=0)
        return self.epochs * len(self.x)

    def reconstruct(self) -> NDArray[Any]:
        return self.model.predict(self.x, batch_size=SCORE_BATCH, verbose=0)


def torch_network(problem: PeerProblem) -> Any:
    from torch import nn

    layers: list[nn.Module] = []
    for k, n in pairwise(problem.widths):
        layers += [nn.Linear(k, n), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def load(network: Any, problem: PeerProblem, seed: int) -> None:
    """Give the linear layers of a torch network the seed's weights."""
    import torch

    linear = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for layer, (w, b) in zip(linear, problem.weights(seed), strict=True):
            layer.weight.copy_(torch.from_numpy(w))
            layer.bias.copy_(torch.from_numpy(b))


class Lightning(Variant):
    packages = ("lightning", "torch")
    precisions = ("float32", "bfloat16")

    def __init__(self, problem: PeerProblem, x: Rows) -> None:
        super().__init__(problem, x)
        import logging

        import lightning
        from torch.utils.data import DataLoader, TensorDataset

        torch = import_torch()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network = torch_network(problem)

            def training_step(self, batch: Any, _: int) -> Any:
                return torch.nn.functional.mse_loss(self.network(batch[0]), batch[0])

            def predict_step(self, batch: Any, _: int) -> Any:
                return self.network(batch[0])

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.parameters(), lr=LR)

        data = TensorDataset(torch.from_numpy(x))
        self.lightning, self.torch, self.make = lightning, torch, Module
        self.loader = DataLoader(data, problem.batch, shuffle=True)
        self.scoring = DataLoader(data, SCORE_BATCH)

    def prepare(self, seed: int, epochs: int) -> None:
        self.epochs, self.model = epochs, self.make()
        load(self.model.network, self.problem, seed)
        self.trainer = self.lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", precision="bf16-mixed" if self.low else "32-true", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    def fit(self) -> int:
        self.trainer.fit(self.model, self.loader)
        return self.epochs * len(self.x)

    def reconstruct(self) -> NDArray[Any]:
        return self.torch.cat(self.trainer.predict(self.model, self.scoring)).float().numpy()


class Sklearn(Variant):
    packages = ("scikit-learn",)

    def __init__(self, problem: PeerProblem, x: Rows) -> None:
        super().__init__(problem, x)
        from sklearn.neural_network import MLPRegressor

        warnings.filterwarnings("ignore", module="sklearn")  # that it has not converged
        self.make = MLPRegressor

    def prepare(self, seed: int, epochs: int) -> None:
        self.epochs = epochs
        self.model = self.make(
            hidden_layer_sizes=self.problem.widths[1:-1], solver="adam", alpha=0.0, batch_size=self.problem.batch,
            learning_rate_init=LR, max_iter=1, tol=0.0, n_iter_no_change=epochs + 1, warm_start=True, random_state=seed,
        )  # fmt: skip
        few = self.x[: self.problem.batch]
        self.model.fit(few, few)  # makes the arrays that are then set
        for layer, (w, b) in enumerate(self.problem.weights(seed)):
            self.model.coefs_[layer] = np.ascontiguousarray(w.T)
            self.model.intercepts_[layer] = b.copy()
        self.model.max_iter = epochs

    def fit(self) -> int:
        self.model.fit(self.x, self.x)
        return self.epochs * len(self.x)

    def reconstruct(self) -> NDArray[Any]:
        return self.model.predict(self.x)


class Skorch(Variant):
    packages = ("skorch", "torch")

    def __init__(self, problem: PeerProblem, x: Rows) -> None:
        super().__init__(problem, x)
        import skorch

        self.make, self.torch = skorch.NeuralNet, import_torch()

    def prepare(self, seed: int, epochs: int) -> None:
        self.epochs, torch = epochs, self.torch
        self.model = self.make(
            torch_network(self.problem), torch.nn.MSELoss, optimizer=torch.optim.Adam, lr=LR, max_epochs=epochs,
            batch_size=self.problem.batch, iterator_train__shuffle=True, iterator_valid__batch_size=SCORE_BATCH,
            train_split=None, verbose=0,
        ).initialize()  # fmt: skip
        load(self.model.module_, self.problem, seed)

    def fit(self) -> int:
        self.model.partial_fit(self.x, self.x)
        return self.epochs * len(self.x)

    def reconstruct(self) -> NDArray[Any]:
        return self.model.predict(self.x)


class PyOD(Variant):
    packages = ("pyod", "torch")
    differs = (
        "drops the last, short batch of an epoch (its rows/s count the others); `fit` scores the rows once at its end"
    )

    def __init__(self, problem: PeerProblem, x: Rows) -> None:
        super().__init__(problem, x)
        from pyod.models.auto_encoder import AutoEncoder

        self.torch = import_torch()

        class Same(AutoEncoder):
            def build_model(self) -> None:
                super().build_model()
                load(self.model, problem, self.random_state)

        self.make = Same

    def prepare(self, seed: int, epochs: int) -> None:
        self.epochs = epochs
        self.model = self.make(
            preprocessing=False, batch_norm=False, dropout_rate=0.0, optimizer_params={"weight_decay": 0.0}, lr=LR,
            epoch_num=epochs, batch_size=self.problem.batch, hidden_neuron_list=list(self.problem.features[1:]),
            random_state=seed, verbose=0,
        )  # fmt: skip

    def fit(self) -> int:
        self.model.fit(self.x)
        return self.epochs * (len(self.x) // self.problem.batch) * self.problem.batch

    def reconstruct(self) -> NDArray[Any]:
        with self.torch.no_grad():
            return self.model.model(self.torch.from_numpy(self.x)).numpy()

    def score(self) -> NDArray[Any]:
        return self.model.decision_function(self.x, SCORE_BATCH) ** 2 / self.x.shape[1]  # it gives distances


VARIANTS: dict[str, type[Variant]] = {
    "fastae": Fastae,
    "Keras": Keras,
    "Lightning": Lightning,
    "scikit-learn": Sklearn,
    "skorch": Skorch,
    "PyOD": PyOD,
}
