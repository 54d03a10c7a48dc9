"""Nudged decoding: what a Hub folder carries, byte for byte. Its modules import torch, transformers and each other."""
