"""Hosts other than transformers, one module each. It knows nothing itself, and imports none of them."""
