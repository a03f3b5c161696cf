"""fastae beside the libraries people train autoencoders with today: `make bench-peers`."""
