"""Layers and losses: `linear_act` and its kin, the arguments they check, the backend that runs them."""
