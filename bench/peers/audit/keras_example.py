"""The variational autoencoder of keras.io/examples/generative/vae, as written there, with layers of one's own."""

from __future__ import annotations

from typing import Any


def make_classes() -> tuple[Any, Any]:
    """(Sampling, VAE): made when they are asked for, since Keras takes seconds to import."""
    import keras
    from keras import ops

    class Sampling(keras.layers.Layer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.seed_generator = keras.random.SeedGenerator(1337)

        def call(self, inputs: Any) -> Any:
            z_mean, z_log_var = inputs
            batch = ops.shape(z_mean)[0]
            dim = ops.shape(z_mean)[1]
            epsilon = keras.random.normal(shape=(batch, dim), seed=self.seed_generator)
            return z_mean + ops.exp(0.5 * z_log_var) * epsilon

    class VAE(keras.Model):
        """`loss(data, reconstruction)` [rows, ...] per value: the example's is binary_crossentropy, summed."""

        def __init__(self, encoder: Any, decoder: Any, loss: Any, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.encoder, self.decoder, self.per_value = encoder, decoder, loss

        def train_step(self, data: Any) -> dict[str, Any]:
            import tensorflow as tf

            with tf.GradientTape() as tape:
                z_mean, z_log_var, z = self.encoder(data)
                reconstruction = self.decoder(z)
                reconstruction_loss = ops.mean(ops.sum(self.per_value(data, reconstruction), axis=-1))
                kl_loss = -0.5 * (1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var))
                kl_loss = ops.mean(ops.sum(kl_loss, axis=1))
                total_loss = reconstruction_loss + kl_loss
            grads = tape.gradient(total_loss, self.trainable_weights)
            self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
            return {"loss": total_loss}

    return Sampling, VAE


def kl_of(mean: Any, log_var: Any) -> tuple[float, Any, Any]:
    """The example's kl_loss and its gradients."""
    import tensorflow as tf
    from keras import ops

    z_mean, z_log_var = tf.Variable(mean), tf.Variable(log_var)
    with tf.GradientTape() as tape:
        kl_loss = -0.5 * (1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var))
        kl_loss = ops.mean(ops.sum(kl_loss, axis=1))
    by_mean, by_log_var = tape.gradient(kl_loss, [z_mean, z_log_var])
    return float(kl_loss), by_mean.numpy(), by_log_var.numpy()


def linear(features: int, code: int) -> Any:
    """The example with one linear layer each way and a Gaussian likelihood of variance 1."""
    import keras
    from keras import layers

    sampling, vae = make_classes()
    rows = keras.Input((features,))
    z_mean = layers.Dense(code, name="z_mean")(rows)
    z_log_var = layers.Dense(code, name="z_log_var")(rows)
    encoder = keras.Model(rows, [z_mean, z_log_var, sampling()([z_mean, z_log_var])])
    codes = keras.Input((code,))
    decoder = keras.Model(codes, layers.Dense(features)(codes))
    return vae(encoder, decoder, lambda data, made: keras.ops.square(data - made) / 2)
