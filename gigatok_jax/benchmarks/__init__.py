"""What `gigatok_jax.benchmark` times: training steps, encoding, decoding, sampling, input."""
