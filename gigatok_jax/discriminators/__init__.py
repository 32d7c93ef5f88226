"""Discriminators: networks that give real images high logits and reconstructions low ones."""
